"""A stack of causal decoder layers: the text models of Thinker and Talker, the code predictor, Code2Wav's transformer.

Pre-norm layers of grouped-query attention, with per-head q/k norms where the configuration says so, then routed experts
(with a shared one beside them in the Talker) or one MLP. Parameters are stacked over layers; `lax.scan` runs over the
layer index with the cache in its carry. A stack that mixes expert and plain layers keeps each kind in its own, shorter
stack.

Two things may touch the hidden states between layers: deepstack features are added to the outputs of the first layers
at visual positions, and `taps` copy chosen hidden states into a small buffer for whoever needs them (Talker, drafters).

Source: transformers `Qwen3OmniMoeThinkerTextModel`. Hidden states are numbered as there: 0 is the input, k the output
of layer k-1 before its deepstack feature is added.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from omni_jax.config import DecoderConfig
from omni_jax.models.param import RMSNorm, param, project
from omni_jax.ops.attention import attend as attend_masked
from omni_jax.ops.attention import causal_attention, self_attention
from omni_jax.ops.cache import KVCache
from omni_jax.ops.expert_parallel import sharded_moe, sharded_route
from omni_jax.ops.rope import rotate
from omni_jax.sharding import constrain, split_over


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Deepstack:
    """features [n, X, D] of n first layers; index int32 [B, T] into X, -1 where a token is not visual."""

    features: jax.Array
    index: jax.Array

    def add(self, x: jax.Array, l: Any) -> jax.Array:
        """x [B, T, D] plus layer `l`'s feature at visual positions."""

        def inject(x: jax.Array) -> jax.Array:
            feature = self.features[l][jnp.maximum(self.index, 0)].astype(x.dtype)
            return jnp.where(self.index[..., None] >= 0, x + feature, x)

        return jax.lax.cond(l < self.features.shape[0], inject, lambda x: x, x)


Rope = tuple[jax.Array, jax.Array]
# (queries [B, T, K, G, H], keys and values [B, T, K, H], cache, layer) -> attended [B, T, K, G, H]
Attend = Callable[[jax.Array, jax.Array, jax.Array, KVCache | None, Any], jax.Array]


class Experts(nnx.Module):
    """Routed experts of L layers: router [L, E, D], gate_up [L, E, D, 2, F], down [L, E, F, D]."""

    def __init__(self, rngs: nnx.Rngs, config: DecoderConfig, layers: int):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.router = param(rngs, (layers, E, D), ("layers", None, "embed"), scale=D**-0.5)
        self.gate_up = param(rngs, (layers, E, D, 2, F), ("layers", "expert", "embed", None, "mlp"), scale=D**-0.5)
        self.down = param(rngs, (layers, E, F, D), ("layers", "expert", "mlp", "embed"), scale=F**-0.5)
        self.config = config
        self.mesh: Mesh | None = None

    def __call__(self, x: jax.Array, l: Any) -> jax.Array:
        """[B, T, D] -> [B, T, D] through the experts of stack index `l`."""
        B, T, D = x.shape
        rows = x.reshape(B * T, D)
        split = () if self.mesh is None else split_over("batch", B, self.mesh)
        chosen, normalise = self.config.experts_per_token, self.config.norm_topk_prob
        ids, weights = sharded_route(rows, self.router[...][l], chosen, normalise, self.mesh, split)
        return sharded_moe(rows, ids, weights, self.gate_up[...], self.down[...], l, self.mesh, split).reshape(B, T, D)


class MLP(nnx.Module):
    """Gated MLP of L layers: down(silu(gate(x)) * up(x)); gate_up [L, 2, F, D], down [L, D, F]."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, layers: int):
        self.gate_up = param(rngs, (layers, 2, inner, width), ("layers", None, "mlp", "embed"), scale=width**-0.5)
        self.down = param(rngs, (layers, width, inner), ("layers", "embed", "mlp"), scale=inner**-0.5)

    def __call__(self, x: jax.Array, l: Any) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate, up = jnp.moveaxis(project(x, self.gate_up[...][l]), 2, 0)
        hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
        return project(hidden, self.down[...][l]).astype(x.dtype)


class SharedExpert(MLP):
    """A gated MLP that takes every row beside the routed experts, weighted by sigmoid(gate . x); gate [L, D]."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, layers: int):
        super().__init__(rngs, width, inner, layers)
        self.gate = param(rngs, (layers, width), ("layers", "embed"), scale=width**-0.5)

    def __call__(self, x: jax.Array, l: Any) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        weight = jax.nn.sigmoid(project(x, self.gate[...][l][None]).astype(x.dtype))
        return weight * super().__call__(x, l)


class DecoderLayers(nnx.Module):
    """L decoder layers, run over whole sequences or behind a cache.

    `unroll` is how many layers the compiled loop holds at once.
    """

    def __init__(self, rngs: nnx.Rngs, config: DecoderConfig):
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
            self.moe = Experts(rngs, config, L - dense)
            if config.shared_expert_intermediate_size:
                self.shared_expert = SharedExpert(rngs, D, config.shared_expert_intermediate_size, L - dense)
        if dense:
            self.mlp = MLP(rngs, D, config.intermediate_size, dense)
        scale = partial(param, rngs, (L, D), ("layers", "embed"), fill=1.0)
        self.attention_scale = scale() if config.layer_scale else None
        self.mlp_scale = scale() if config.layer_scale else None

    def whole(
        self,
        x: jax.Array,
        rope: Rope,
        cache: KVCache | None = None,
        first_valid: jax.Array | None = None,
        deepstack: Deepstack | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[jax.Array, KVCache | None, jax.Array]:
        """Run whole sequences x [B, T, D] at rope (cos, sin) [B, T, H], real from token `first_valid` [B] on.

        Returns the outputs [B, T, D], the cache (empty, at least T slots) with the sequences in it, and the tapped
        hidden states [n, B, T, D]. The state numbered L, which follows the final norm, is the caller's to fill in.
        """
        window = self.config.sliding_window

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: KVCache | None, l: Any) -> jax.Array:
            return self_attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), first_valid, window)

        return self.run(x, rope, cache, attend, deepstack, taps)

    def extend(
        self,
        x: jax.Array,
        rope: Rope,
        cache: KVCache,
        first_valid: jax.Array | None = None,
        taps: tuple[int, ...] = (),
        unroll: int = 1,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        """Run x [B, T, D] behind what each row of the cache holds; returns as `whole`, T tokens more in the cache.

        first_valid: int32 [B], the first slot of each row that holds a token; 0 by default. mask: bool [B, T, S], the
        slots that each token sees, itself included; by default all up to its own.
        """
        window = self.config.sliding_window

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache | None, l: Any) -> jax.Array:
            assert cache is not None
            if mask is not None:
                return attend_masked(q, cache.k[l], cache.v[l], mask)
            return causal_attention(q, cache.k[l], cache.v[l], cache.length, first_valid, window)

        x, extended, tapped = self.run(x, rope, cache, attend, None, taps, unroll)
        assert extended is not None
        return x, extended, tapped

    def run(
        self,
        x: jax.Array,
        rope: Rope,
        cache: KVCache | None,
        attend: Attend,
        deepstack: Deepstack | None = None,
        taps: tuple[int, ...] = (),
        unroll: int = 1,
    ) -> tuple[jax.Array, KVCache | None, jax.Array]:
        """Run x [B, T, D] with attention as `attend` defines it; returns as `whole`.

        attend: is given the cache after the layer has written its T keys and values behind what each row holds.
        """
        L = self.config.num_layers
        slots = jnp.asarray([taps.index(k) if k in taps and k < L else -1 for k in range(L + 1)], jnp.int32)
        tapped = jnp.zeros((len(taps), *x.shape), x.dtype)

        def layer(carry: tuple, _: None) -> tuple[tuple, None]:
            l, x, cache, tapped = carry
            attended, cache = self._attention(x, l, rope, cache, attend)
            x = x + _scaled(attended, self.attention_scale, l)
            x = x + _scaled(self._feed_forward(self.mlp_norm(x, l), l), self.mlp_scale, l)
            if taps:
                tapped = _tap(tapped, x, slots[l + 1])
            if deepstack is not None:
                x = deepstack.add(x, l)
            return (l + 1, self._by_rows(x), cache, tapped), None

        if 0 in taps:
            tapped = tapped.at[taps.index(0)].set(x)
        # The index is a counter in the carry: read from a scanned array, XLA on GPU would copy each layer's experts.
        carry = (jnp.int32(0), self._by_rows(x), cache.laid_over(self.mesh) if cache is not None else None, tapped)
        (_, x, cache, tapped), _ = jax.lax.scan(layer, carry, None, length=L, unroll=unroll)
        return x, cache.advance(x.shape[1]) if cache is not None else None, tapped

    def _attention(
        self, x: jax.Array, l: Any, rope: Rope, cache: KVCache | None, attend: Attend
    ) -> tuple[jax.Array, KVCache | None]:
        config = self.config
        B, T, _ = x.shape
        qkv = project(self.attention_norm(x, l), self.qkv[...][l]).astype(x.dtype)
        q, k, v = qkv[:, :, :, :-2], qkv[:, :, :, -2], qkv[:, :, :, -1]
        if config.qk_norm:
            q, k = self.q_norm(q, l), self.k_norm(k, l)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            cache = cache.write(l, k, v).laid_over(self.mesh)
        out = attend(q, k, v, cache, l).reshape(B, T, config.num_heads, config.head_dim)
        return project(out, self.out[...][l], contracted=2).astype(x.dtype), cache

    def _feed_forward(self, x: jax.Array, l: jax.Array) -> jax.Array:
        dense = self.config.dense_layers
        if not dense:
            return self._experts(x, l)
        if len(dense) == self.config.num_layers:
            return self.mlp(x, l)
        is_dense = jnp.asarray([i in dense for i in range(self.config.num_layers)])
        before = jnp.cumsum(is_dense) - is_dense
        return jax.lax.cond(is_dense[l], lambda: self.mlp(x, before[l]), lambda: self._experts(x, l - before[l]))

    def _by_rows(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] with its rows on the devices that hold them, and whole there."""
        return constrain(x, ("batch", None, None), self.mesh)

    def _experts(self, x: jax.Array, l: jax.Array) -> jax.Array:
        routed = self.moe(x, l)
        return routed + self.shared_expert(x, l) if self.config.shared_expert_intermediate_size else routed


def _scaled(x: jax.Array, scale: nnx.Param | None, l: Any) -> jax.Array:
    """x [B, T, D] times layer `l` of scale [L, D], where a stack has one."""
    return x if scale is None else x * scale[...][l]


def _tap(tapped: jax.Array, x: jax.Array, slot: jax.Array) -> jax.Array:
    """Copy x [B, T, D] into row `slot` of tapped [n, B, T, D] unless slot is negative."""
    return jax.lax.cond(
        slot >= 0,
        lambda: jax.lax.dynamic_update_index_in_dim(tapped, x, jnp.maximum(slot, 0), 0),
        lambda: tapped,
    )
