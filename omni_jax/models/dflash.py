"""DFlash: a whole block of drafts in one pass.

    hidden states of the Thinker -> fc -> hidden_norm -> keys and values of every layer, remembered once per token
    last token, W - 1 mask tokens (embedded) -> layers, each over [what is remembered; the block] -> norm -> head

The drafter makes its keys from the Thinker's hidden states of each token, so it needs no pass over the tokens
themselves. Output i of a block predicts the token *at* its position, not the one after it; output 0 is not used.
Embedding and head are the Thinker's, applied by the caller.

Positions are the plain index of a token in its row: the slot of its keys, whatever its multimodal position in the
Thinker is.

Source: "DFlash: Block Diffusion for Flash Speculative Decoding" and z-lab `DFlashDraftModel`. There the block's keys
are appended to the remembered ones and cropped afterwards; here they are written into the slots after them, which are
never counted. In training the blocks of many places of a row are drafted at once (`draft_blocks`).
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.draft_config import DFlashConfig
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.param import Linear, Module, RMSNorm, project, scan_layers
from omni_jax.ops.attention import attend
from omni_jax.ops.branches import attend_branches
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
        """A cache [L, rows, K, capacity, H] that holds nothing yet."""
        c = self.config.layers
        return KVCache.empty(c.num_layers, rows, c.num_kv_heads, capacity, c.head_dim, dtype)

    @jax.named_scope("fuse")
    def fuse(self, features: jax.Array) -> jax.Array:
        """Hidden states side by side, in the order of the taps, [B, T, n * D] -> context [B, T, D]."""
        return self.hidden_norm(self.fc(features))

    @jax.named_scope("remember")
    def remember(self, cache: KVCache, context: jax.Array, count: jax.Array) -> KVCache:
        """Put keys and values of context [B, T, D] after what each row holds; the first `count` int32 [B] are real.

        All T are written, and the cache must have the slots; those beyond `count` are overwritten later.
        """
        layers, rotation = self.layers, self._rope(cache, context)

        def layer(carry: tuple[jax.Array, KVCache], _: None) -> tuple[tuple[jax.Array, KVCache], None]:
            l, cache = carry
            return (l + 1, cache.write(l, *_keys_values(layers, l, context, rotation))), None

        (_, cache), _ = jax.lax.scan(layer, (jnp.int32(0), cache), None, length=self.config.layers.num_layers)
        return cache.advance(count)

    @jax.named_scope("draft")
    def draft(self, x: jax.Array, cache: KVCache, unroll: int = 1) -> tuple[jax.Array, KVCache]:
        """An embedded block [B, W, D] after what each row holds -> normed states [B, W, D], and the cache.

        The cache holds what it held, though the W slots after that are written; continue with the one that is returned,
        so that XLA works in place. unroll: how many layers the compiled loop holds at once.
        """
        W = x.shape[1]
        visible = _block_masks(self.config, cache, W)

        def over_context(q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache, l: Any) -> jax.Array:
            return attend(q, cache.k[l], cache.v[l], visible(l))

        x, written, _ = self.layers.run(x, self._rope(cache, x), cache, over_context, unroll=unroll)
        return self.norm(x), replace(written, length=cache.length)

    @jax.named_scope("draft_blocks")
    def draft_blocks(
        self, x: jax.Array, context: jax.Array, anchor: jax.Array, position: jax.Array, remat: bool = False
    ) -> jax.Array:
        """Embedded blocks [B, A, W, D] that begin at A tokens of whole rows -> normed states [B, A, W, D].

        Each is drafted as `draft` would after the tokens before it. context: [B, T, D] of the rows, from `fuse`.
        anchor: int32 [B, A], the token of its row at which each block begins. position: int32 [B, T], the index of each
        token in its sample; a block sees its own sample only. remat: as in `DecoderLayers.forward`.
        """
        (B, A, W, D), c = x.shape, self.config.layers
        start = jnp.take_along_axis(position, anchor, axis=1)
        offset = jnp.arange(W)
        own = (start[..., None] + offset).reshape(B, A * W)
        rotation, row_rotation = (rope(p.astype(jnp.float32), c.head_dim, c.rope, x.dtype) for p in (own, position))
        # A window as wide as the row hides nothing.
        windows = jnp.asarray([position.shape[1] + W if window is None else window for window in self.config.windows])
        causal = jnp.asarray(self.config.causal)

        def layer(one: DecoderLayers, x: jax.Array, l: jax.Array) -> tuple[jax.Array, None]:
            row_k, row_v = (y.swapaxes(1, 2) for y in _keys_values(one, 0, context, row_rotation))
            oldest = anchor[..., None] + offset - windows[l] + 1
            first = jnp.maximum((anchor - start)[..., None], oldest)
            apart = offset[:, None] - offset
            own_mask = (jnp.abs(apart) < windows[l]) & (~causal[l] | (apart >= 0))

            def over_blocks(q: jax.Array, k: jax.Array, v: jax.Array, _: None, __: Any) -> jax.Array:
                q, k, v = (y.reshape(B, A, W, *y.shape[2:]) for y in (q, k, v))
                out = attend_branches(q, (row_k, row_v), (k, v), first, anchor, own_mask)
                return out.reshape(B, A * W, *out.shape[3:])

            return one.layer(x, 0, l, rotation, over_blocks), None

        x, _ = scan_layers(self.layers, layer, x.reshape(B, A * W, D), c.num_layers, remat)
        return self.norm(x).reshape(B, A, W, D)

    def _rope(self, cache: KVCache, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """cos and sin [B, T, H] of x [B, T, D] at the positions after what each row holds."""
        c = self.config.layers
        position = cache.length[:, None] + jnp.arange(x.shape[1])
        return rope(position.astype(jnp.float32), c.head_dim, c.rope, x.dtype)


def _keys_values(
    layers: DecoderLayers, l: Any, context: jax.Array, rotation: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, T, K, H] that layer `l` makes of context [B, T, D] at rotation (cos, sin) [B, T, H]."""
    keys_values = project(context, layers.qkv[...][l][:, -2:]).astype(context.dtype)
    return rotate(layers.k_norm(keys_values[:, :, :, 0], l), *rotation), keys_values[:, :, :, 1]


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
