"""A stack of causal decoder layers: the text models of Thinker and Talker, the code predictor, Code2Wav's transformer.

Pre-norm layers of grouped-query attention, with per-head q/k norms where the configuration has them, then routed
experts (and a shared one in the Talker) or one MLP. Parameters are stacked over layers; `lax.scan` runs over the layer
index with the cache in its carry. A stack that mixes expert and plain layers keeps each kind in its own, shorter stack.

Two things happen to the hidden states between layers: deepstack features are added to the outputs of the first layers
at visual positions, and `taps` copy chosen hidden states into a small buffer, for the Talker and for drafters.

Programs with a cache read a layer from the stacks by its index, in place. `forward`, which is the one that is trained,
is given each layer's slice of them: by index, the backward pass of every layer would add to whole stacks.

One token per row may attend by a kernel of its own (`ops.decode_kernel`).

Declared with a `LowRankConfig`, a stack also holds low-rank updates of its projections (`low_rank`).

Source: transformers `Qwen3OmniMoeThinkerTextModel`. Hidden states are numbered as there: 0 is the input, k the output
of layer k-1 before its deepstack feature is added.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from omni_jax.config import DecoderConfig
from omni_jax.models.feed_forward import MLP, Experts, SharedExpert
from omni_jax.models.low_rank import NOTHING, AttentionLowRank, LowRankConfig, add
from omni_jax.models.output import CachedOutput, ExpertLoad, Output
from omni_jax.models.param import Module, RMSNorm, param, project, scan_layers
from omni_jax.ops.attention import attend, cached_attention, self_attention
from omni_jax.ops.cache import KVCache
from omni_jax.ops.decode_kernel import Norms, OneToken, chosen, fused
from omni_jax.ops.rope import rotate
from omni_jax.sharding import constrain, platform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Deepstack:
    """features [n, X, D] of the first n layers; index int32 [B, T] into X, -1 where a token is not visual."""

    features: jax.Array
    index: jax.Array

    @jax.named_scope("deepstack")
    def add(self, x: jax.Array, l: Any) -> jax.Array:
        """x [B, T, D] plus layer `l`'s feature at visual positions."""

        def inject(x: jax.Array) -> jax.Array:
            feature = self.features[l][jnp.maximum(self.index, 0)].astype(x.dtype)
            return jnp.where(self.index[..., None] >= 0, x + feature, x)

        return jax.lax.cond(l < self.features.shape[0], inject, lambda x: x, x)


# Layers of one turn of a loop on GPU, and the longest stack that needs no loop.
GPU_LAYERS, SHORT_STACK = 4, 8

Rope = tuple[jax.Array, jax.Array]
Cache = TypeVar("Cache", KVCache, None)
# (queries [B, T, K, G, H], keys and values [B, T, K, H], cache, layer) -> attended [B, T, K, G, H]
Attention = Callable[[jax.Array, jax.Array, jax.Array, Cache, Any], jax.Array]


class DecoderLayers(Module):
    """L decoder layers, run over whole sequences or after what a cache holds."""

    def __init__(self, rngs: nnx.Rngs, config: DecoderConfig, lora: LowRankConfig = NOTHING):
        L, D, N, K, H = (
            config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        )  # fmt: skip
        self.config = config
        self.mesh: Mesh | None = None
        self.attention_norm = RMSNorm(rngs, D, config.rms_norm_eps, layers=L)
        self.qkv = param(
            rngs, (L, K, N // K + 2, H, D), ("layers", "kv_heads", None, "head_dim", "embed"), scale=D**-0.5
        )
        if config.qk_norm:
            self.q_norm = RMSNorm(rngs, H, config.rms_norm_eps, layers=L, axis="head_dim")
            self.k_norm = RMSNorm(rngs, H, config.rms_norm_eps, layers=L, axis="head_dim")
        self.out = param(rngs, (L, D, N, H), ("layers", "embed", "heads", "head_dim"), scale=(N * H) ** -0.5)
        self.mlp_norm = RMSNorm(rngs, D, config.rms_norm_eps, layers=L)
        dense = len(config.dense_layers)
        if L > dense:
            self.moe = Experts(rngs, config, L - dense, lora)
            if config.shared_expert_intermediate_size:
                self.shared_expert = SharedExpert(rngs, D, config.shared_expert_intermediate_size, L - dense, lora)
        if dense:
            self.mlp = MLP(rngs, D, config.intermediate_size, dense, lora)
        attends = not {*"qkvo"}.isdisjoint(lora.targets)
        self.lora = AttentionLowRank(rngs, lora, D, (K, N // K, H), L) if attends else None
        scale = partial(param, rngs, (L, D), ("layers", "embed"), fill=1.0)
        self.attention_scale = scale() if config.layer_scale else None
        self.mlp_scale = scale() if config.layer_scale else None

    def forward(
        self,
        x: jax.Array,
        rope: Rope,
        first_valid: jax.Array | None = None,
        deepstack: Deepstack | None = None,
        taps: tuple[int, ...] = (),
        counted: jax.Array | None = None,
        remat: bool = False,
    ) -> Output:
        """Run whole sequences x [B, T, D] at rope (cos, sin) [B, T, H], without a cache.

        first_valid: int32 [B], the first token of each row that is not padding, 0 by default; or int32 [B, T], the
        first token that each token sees. taps: numbers of the hidden states to give; the one numbered L, which follows
        the final norm, is the caller's to fill in. counted: bool [B, T], the tokens whose load on the experts is given;
        none by default. remat: whether a backward pass computes a layer anew instead of keeping what it made.
        """
        attention, tapped = self._over_sequence(first_valid), _Tapped.of(taps, self.config.num_layers, x)

        def layer(one: "DecoderLayers", carry: tuple, l: jax.Array) -> tuple[tuple, ExpertLoad | None]:
            x, tapped = carry
            attended, _ = one._attention(x, 0, rope, None, attention)
            x = x + _scaled(attended, one.attention_scale, 0)
            read = one.mlp_norm(x, 0)
            x = x + _scaled(one._feed_forward(read, 0, l), one.mlp_scale, 0)
            tapped = tapped.put(x, l + 1)
            x = x if deepstack is None else deepstack.add(x, l)
            return (self._by_rows(x), tapped), None if counted is None else one._load(read, counted, l)

        carry = (self._by_rows(x), tapped)
        (x, tapped), load = scan_layers(self, layer, carry, self.config.num_layers, remat)
        return Output(x, tapped.states, load)

    def prefill(
        self,
        x: jax.Array,
        rope: Rope,
        cache: KVCache,
        deepstack: Deepstack | None = None,
        taps: tuple[int, ...] = (),
    ) -> CachedOutput:
        """As `forward`, right-padded sequences x [B, T, D], which an empty cache of at least T slots then holds."""
        attention = self._over_sequence(None, forward=self._alone)
        x, cache, tapped = self.run(x, rope, cache, attention, deepstack, taps)
        return CachedOutput(x, cache, tapped)

    def extend(
        self,
        x: jax.Array,
        rope: Rope,
        cache: KVCache,
        first_valid: jax.Array | None = None,
        taps: tuple[int, ...] = (),
        unroll: int | None = None,
        mask: jax.Array | None = None,
        deepstack: Deepstack | None = None,
    ) -> CachedOutput:
        """Run x [B, T, D] after what each row of the cache holds; the cache then holds T tokens more.

        Without a mask, there is no backward pass for more than `FEW_QUERIES` tokens.

        first_valid: int32 [B], the first slot of each row that holds a token; 0 by default. mask: bool [B, T, S], the
        slots that each token sees, itself included; by default all up to its own. unroll: how many layers the compiled
        loop holds at once; by default one on CPU, and as many on GPU as launch little and compile soon.
        """
        window, attention = self.config.sliding_window, None
        if self._alone and mask is None and chosen(x, cache, self.config.head_dim, first_valid):
            attention = OneToken(first_valid, window)

        def over_cache(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, l: Any) -> jax.Array:
            if mask is not None:
                return attend(q, cache.k[l], cache.v[l], mask)
            return cached_attention(q, cache.k, cache.v, l, cache.length, first_valid, window, self._alone)

        unroll = layers_at_once(self.config.num_layers) if unroll is None else unroll
        x, cache, tapped = self.run(x, rope, cache, attention or over_cache, deepstack, taps, unroll)
        return CachedOutput(x, cache, tapped)

    @property
    def _alone(self) -> bool:
        """Whether one device has everything."""
        return self.mesh is None or self.mesh.size == 1

    def _over_sequence(self, first_valid: jax.Array | None, forward: bool = False) -> Callable[..., jax.Array]:
        """Attention within whole sequences, for `run`; forward: as of `self_attention`."""
        window = self.config.sliding_window

        def over_sequence(q: jax.Array, k: jax.Array, v: jax.Array, _: Any, l: Any) -> jax.Array:
            return self_attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), first_valid, window, forward)

        return over_sequence

    def run(
        self,
        x: jax.Array,
        rope: Rope,
        cache: Cache,
        attention: Attention[Cache] | OneToken,
        deepstack: Deepstack | None = None,
        taps: tuple[int, ...] = (),
        unroll: int = 1,
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Run x [B, T, D] with the given attention: outputs [B, T, D], cache, tapped hidden states [n, B, T, D].

        attention: is given the cache after the layer has written its T keys and values after what each row holds; or
        what the only token of each row sees, for the kernel.
        """
        tapped = _Tapped.of(taps, self.config.num_layers, x)

        def layer(carry: tuple, attention: Attention[Cache] | OneToken) -> tuple:
            l, x, cache, tapped = carry
            attended, cache = self._attention(x, l, rope, cache, attention)
            x = x + _scaled(attended, self.attention_scale, l)
            x = x + _scaled(self._feed_forward(self.mlp_norm(x, l), l, l), self.mlp_scale, l)
            tapped = tapped.put(x, l + 1)
            if deepstack is not None:
                x = deepstack.add(x, l)
            return l + 1, self._by_rows(x), cache, tapped

        # A kernel's layers of one turn know their places: a sum would be a launch for each.
        L = self.config.num_layers
        places = unroll if isinstance(attention, OneToken) and L % unroll == 0 else 1

        def turn(carry: tuple, _: None) -> tuple[tuple, None]:
            for place in range(places):
                placed = replace(attention, offset=place) if isinstance(attention, OneToken) else attention
                carry = layer(carry, placed)
            return carry, None

        # The index is a counter in the carry: read from a scanned array, XLA on GPU would copy each layer's experts.
        laid = None if cache is None else cache.laid_over(self.mesh)
        carry: Any = (jnp.int32(0), self._by_rows(x), laid, tapped)
        turns = L // places
        (_, x, cache, tapped), _ = jax.lax.scan(turn, carry, None, length=turns, unroll=min(turns, unroll // places))
        return x, cache if cache is None else cache.advance(x.shape[1]), tapped.states

    @jax.named_scope("attention")
    def _attention(
        self, x: jax.Array, l: Any, rope: Rope, cache: Cache, attention: Attention[Cache] | OneToken
    ) -> tuple[jax.Array, Cache]:
        """x [B, T, D] through layer `l`'s attention -> [B, T, D], and the cache with the layer's keys and values."""
        config = self.config
        B, T, _ = x.shape
        read = self.attention_norm(x, l)
        qkv = project(read, self.qkv[...][l])
        qkv = qkv if self.lora is None else self.lora.add_qkv(qkv, read, l)
        if isinstance(attention, OneToken):
            assert cache is not None
            out, cache = fused(qkv[:, 0], rope, cache, l, self._qk_norms(), attention)
        else:
            qkv = qkv.astype(x.dtype)
            q, k, v = qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]
            if config.qk_norm:
                q, k = self.q_norm(q, l), self.k_norm(k, l)
            q, k = rotate(q, *rope), rotate(k, *rope)
            if cache is not None:
                cache = cache.write(l, k, v).laid_over(self.mesh)
            out = attention(q, k, v, cache, l)
        out = out.reshape(B, T, config.num_heads, config.head_dim)
        y = project(out, self.out[...][l], contracted=2)
        return (y if self.lora is None else add(y, self.lora.o, out, l)).astype(x.dtype), cache

    def _qk_norms(self) -> Norms | None:
        """The norms of queries and keys of all layers, where there are some."""
        if not self.config.qk_norm:
            return None
        return Norms(self.q_norm.weight[...], self.k_norm.weight[...], self.q_norm.eps)

    def layer(self, x: jax.Array, i: Any, l: Any, rope: Rope, attention: Attention[None]) -> jax.Array:
        """x [B, T, D] through layer `l`, which is at index `i` of the stacks, without a cache; the rest as in `run`."""
        attended, _ = self._attention(x, i, rope, None, attention)
        x = x + _scaled(attended, self.attention_scale, i)
        return x + _scaled(self._feed_forward(self.mlp_norm(x, i), i, l), self.mlp_scale, i)

    def router_inputs(
        self, x: jax.Array, l: Any, rope: Rope, cache: KVCache, attention: Callable[..., jax.Array]
    ) -> jax.Array:
        """What the router of layer `l` reads, [B, T, D], for the layer's input x [B, T, D]; the rest as in `run`."""
        attended, _ = self._attention(x, l, rope, cache, attention)
        return self.mlp_norm(x + _scaled(attended, self.attention_scale, l), l)

    def _feed_forward(self, x: jax.Array, i: Any, l: Any) -> jax.Array:
        """x [B, T, D] through the MLP or the experts of layer `l`, whose index in a stack of all layers is `i`."""
        dense = self.config.dense_layers
        if not dense:
            return self._experts(x, i)
        if len(dense) == self.config.num_layers:
            return self.mlp(x, i)
        is_dense, before = self._dense_before(l)
        return jax.lax.cond(is_dense, lambda: self.mlp(x, before), lambda: self._experts(x, l - before))

    def _load(self, x: jax.Array, counted: jax.Array, l: Any) -> ExpertLoad:
        """`Experts.load` of layer `l`; zeros for a layer without experts."""
        if not self.config.dense_layers:
            return self.moe.load(x, counted, 0)
        none = ExpertLoad(*jnp.zeros((2, self.config.num_experts)))
        if len(self.config.dense_layers) == self.config.num_layers:
            return none
        is_dense, before = self._dense_before(l)
        return jax.lax.cond(is_dense, lambda: none, lambda: self.moe.load(x, counted, l - before))

    def _dense_before(self, l: Any) -> tuple[jax.Array, jax.Array]:
        """Whether layer `l` has a plain MLP, bool [], and how many of those before it have, int32 []."""
        is_dense = jnp.asarray([i in self.config.dense_layers for i in range(self.config.num_layers)])
        before = jnp.cumsum(is_dense) - is_dense
        return is_dense[l], before[l]

    def _by_rows(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] with its rows on the devices that hold them, each row whole."""
        return constrain(x, ("batch", None, None), self.mesh)

    def _experts(self, x: jax.Array, l: jax.Array) -> jax.Array:
        routed = self.moe(x, l)
        return routed + self.shared_expert(x, l) if self.config.shared_expert_intermediate_size else routed


def layers_at_once(layers: int) -> int:
    """How many of so many layers a compiled loop for few tokens holds at once.

    On GPU each turn of a loop launches its counter and its condition, and copies what is shared by its layers' kernels.
    """
    return 1 if platform() == "cpu" else layers if layers <= SHORT_STACK else GPU_LAYERS


def _scaled(x: jax.Array, scale: nnx.Param | None, l: Any) -> jax.Array:
    """x [B, T, D] times layer `l` of scale [L, D], where a stack has one."""
    return x if scale is None else x * scale[...][l]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Tapped:
    """states [n, B, T, D]: hidden states that are kept; slot int32 [L + 1]: where each number goes, -1 for nowhere."""

    states: jax.Array
    slot: jax.Array

    @classmethod
    def of(cls, taps: tuple[int, ...], L: int, x: jax.Array) -> "_Tapped":
        """Room for the states numbered `taps`, with number 0, the input x [B, T, D], in place; L is left to others."""
        slot = jnp.asarray([taps.index(k) if k in taps and k < L else -1 for k in range(L + 1)], jnp.int32)
        states = jnp.zeros((len(taps), *x.shape), x.dtype)
        return cls(states.at[taps.index(0)].set(x) if 0 in taps else states, slot)

    def put(self, x: jax.Array, k: Any) -> "_Tapped":
        """With hidden state number `k`, x [B, T, D], kept if it was asked for."""
        if not len(self.states):
            return self

        def write() -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(self.states, x, jnp.maximum(self.slot[k], 0), 0)

        return replace(self, states=jax.lax.cond(self.slot[k] >= 0, write, lambda: self.states))
