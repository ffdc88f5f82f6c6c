"""DFlash: a whole block of drafts in one pass.

    hidden states of the Thinker -> fc -> hidden_norm -> keys and values of every layer, remembered once per token
    token at hand, W - 1 mask tokens (embedded) -> layers, each over [what is remembered; the block] -> norm -> head

The drafter makes its keys of what the Thinker thought about each token, so it needs no pass over the tokens themselves.
Output i of a block stands for the token *at* its position, not for the one after it; output 0 is of no use. Embedding
and head are the Thinker's, applied by whoever runs both.

Positions are the plain index of a token in its row: that is the slot where its keys lie, whatever multimodal positions
the Thinker gave it.

Source: "DFlash: Block Diffusion for Flash Speculative Decoding" and z-lab `DFlashDraftModel`. There the block's keys
are appended to the remembered ones and cropped afterwards; here they lie in the slots behind them, which are never
counted.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.draft_config import DFlashConfig
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.param import Linear, Module, RMSNorm, project
from omni_jax.ops.attention import attend
from omni_jax.ops.cache import KVCache
from omni_jax.ops.rope import rope, rotate


class DFlash(Module):
    """fc [D, n * D] and hidden_norm for n hidden states, dense decoder layers with q/k norms, the final norm."""

    def __init__(self, rngs: nnx.Rngs, config: DFlashConfig):
        D, eps = config.layers.hidden_size, config.layers.rms_norm_eps
        self.config = config
        self.fc = Linear(rngs, (D, len(config.target_layer_ids) * D), ("embed", None), bias=False)
        self.hidden_norm = RMSNorm(rngs, D, eps)
        self.layers = DecoderLayers(rngs, config.layers)
        self.norm = RMSNorm(rngs, D, eps)

    def empty(self, rows: int, capacity: int, dtype: Any) -> KVCache:
        """A cache of `capacity` slots for `rows` rows, of which nothing is remembered."""
        c = self.config.layers
        return KVCache.empty(c.num_layers, rows, c.num_kv_heads, capacity, c.head_dim, dtype)

    @jax.named_scope("fuse")
    def fuse(self, features: jax.Array) -> jax.Array:
        """Hidden states side by side, in the order of the taps, [B, T, n * D] -> context [B, T, D]."""
        return self.hidden_norm(self.fc(features))

    @jax.named_scope("remember")
    def remember(self, cache: KVCache, context: jax.Array, count: jax.Array) -> KVCache:
        """Put keys and values of context [B, T, D] behind what each row holds; the first `count` int32 [B] are real.

        All T are written, and the cache must have the slots; those beyond `count` are overwritten later.
        """
        layers, rotation = self.layers, self._rope(cache, context)

        def layer(carry: tuple[jax.Array, KVCache], _: None) -> tuple[tuple[jax.Array, KVCache], None]:
            l, cache = carry
            keys_values = project(context, layers.qkv[...][l][:, -2:]).astype(context.dtype)
            k = rotate(layers.k_norm(keys_values[:, :, :, 0], l), *rotation)
            return (l + 1, cache.write(l, k, keys_values[:, :, :, 1])), None

        (_, cache), _ = jax.lax.scan(layer, (jnp.int32(0), cache), None, length=self.config.layers.num_layers)
        return cache.advance(count)

    @jax.named_scope("draft")
    def draft(self, x: jax.Array, cache: KVCache, unroll: int = 1) -> tuple[jax.Array, KVCache]:
        """An embedded block [B, W, D] behind what each row holds -> normed states [B, W, D], and the cache.

        The cache remembers what it did, though its W slots behind are written: going on with the one returned lets
        XLA work in place.
        """
        W = x.shape[1]
        visible = _block_masks(self.config, cache, W)

        def over_context(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, l: Any) -> jax.Array:
            return attend(q, cache.k[l], cache.v[l], visible(l))

        x, written, _ = self.layers.run(x, self._rope(cache, x), cache, over_context, unroll=unroll)
        return self.norm(x), replace(written, length=cache.length)

    def _rope(self, cache: KVCache, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin of x [B, T, D] at the positions behind what each row holds."""
        c = self.config.layers
        position = cache.length[:, None] + jnp.arange(x.shape[1])
        return rope(position.astype(jnp.float32), c.head_dim, c.rope, x.dtype)


def _block_masks(config: DFlashConfig, cache: KVCache, W: int) -> Any:
    """A function of the layer: bool [B, W, S], which slots a block's queries see."""
    key = jnp.arange(cache.capacity)
    query = (cache.length[:, None] + jnp.arange(W))[..., None]
    written = key < cache.length[:, None, None] + W
    causal = jnp.asarray(config.causal)
    # A window as wide as the cache hides nothing.
    windows = jnp.asarray([cache.capacity if window is None else window for window in config.windows])

    def visible(l: Any) -> jax.Array:
        near = jnp.abs(query - key) < windows[l]
        return written & near & (~causal[l] | (key <= query))

    return visible
