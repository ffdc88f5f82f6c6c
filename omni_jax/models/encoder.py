"""The transformer block stack that the vision and the audio encoder share.

Data flow: media rows (one video frame, or one audio attention window) -> `EncoderBlocks` -> rows of the same shape,
which the encoder then projects to the text model's width. A row is one attention segment: its tokens attend to all
tokens of the row and to no others, so no mask between segments is needed, only a length.

Source: transformers `Qwen3OmniMoeVisionBlock` and `Qwen3OmniMoeAudioEncoderLayer` (pre-LayerNorm, biases everywhere).
Deliberate differences: q, k and v are one projection (the reference has three in the audio encoder); segments are
padded rows instead of cumulative lengths over one long sequence; long rows take their queries a chunk at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.models.param import LayerNorm, Linear, Module, param, project, scan_layers
from omni_jax.ops.attention import attend_in_rows
from omni_jax.ops.rope import rotate

Rotary = tuple[jax.Array, jax.Array]


class FusedQKV(Module):
    """Query, key and value projections as one: weight [L, 3, N, H, D] and bias [L, 3, N, H]."""

    def __init__(self, rngs: nnx.Rngs, layers: int, width: int, heads: int):
        head_dim, axes = width // heads, ("layers", None, "heads", "head_dim")
        self.weight = param(rngs, (layers, 3, heads, head_dim, width), (*axes, "embed"), scale=width**-0.5)
        self.bias = param(rngs, (layers, 3, heads, head_dim), axes)

    def __call__(self, x: jax.Array, l: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[R, T, D] -> queries, keys and values of layer `l`, each [R, T, N, H] in x's dtype."""
        y = (project(x, self.weight[...][l]) + self.bias[...][l]).astype(x.dtype)
        return y[:, :, 0], y[:, :, 1], y[:, :, 2]


class EncoderBlocks(Module):
    """A stack of bidirectional pre-LayerNorm transformer blocks over rows; the layers' parameters are stacked."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        layers: int,
        width: int,
        heads: int,
        mlp: int,
        eps: float,
        activation: Callable[[jax.Array], jax.Array],
    ):
        self.layers, self.activation = layers, activation
        self.attention_norm = LayerNorm(rngs, width, eps, layers)
        self.qkv = FusedQKV(rngs, layers, width, heads)
        self.out = Linear(rngs, (width, width), ("embed", "heads"), layers)
        self.mlp_norm = LayerNorm(rngs, width, eps, layers)
        self.fc1 = Linear(rngs, (mlp, width), ("mlp", "embed"), layers)
        self.fc2 = Linear(rngs, (width, mlp), ("embed", "mlp"), layers)

    def __call__(
        self,
        x: jax.Array,
        lengths: jax.Array,
        rotary: Rotary | None = None,
        taps: tuple[int, ...] = (),
        remat: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Rows [R, T, D] and their lengths [R] -> the last layer's rows, and the `taps` layers' rows [n, R, T, D].

        rotary: cos and sin, float32 [R, T, H]. taps: layer indices in rising order; a tap is that layer's output.
        remat: whether a backward pass computes a layer anew instead of keeping what it made.
        """
        # Every layer writes where the next tap belongs, so the tap itself writes last; layers after the last tap write
        # to a spare slot. One slot a layer moves, and nothing is stacked over all layers.
        slot = jnp.asarray(np.searchsorted(taps, np.arange(self.layers)), jnp.int32)
        tapped = jnp.zeros((len(taps) + 1, *x.shape), x.dtype)

        def layer(one: "EncoderBlocks", carry: tuple, l: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, tapped = carry
            x = one._block(x, lengths, rotary, 0)
            return (x, jax.lax.dynamic_update_index_in_dim(tapped, x, slot[l], 0)), None

        (x, tapped), _ = scan_layers(self, layer, (x, tapped), self.layers, remat)
        return x, tapped[: len(taps)]

    @jax.named_scope("block")
    def _block(self, x: jax.Array, lengths: jax.Array, rotary: Rotary | None, l: int) -> jax.Array:
        R, T, D = x.shape
        with jax.named_scope("attention"):
            q, k, v = self.qkv(self.attention_norm(x, l), l)
            if rotary is not None:
                # cos and sin are float32, and so is the product with half-precision queries and keys.
                q, k = (rotate(x, *rotary).astype(x.dtype) for x in (q, k))
            x = x + self.out(attend_in_rows(q, k, v, lengths).reshape(R, T, D), l)
        with jax.named_scope("mlp"):
            return x + self.fc2(self.activation(self.fc1(self.mlp_norm(x, l), l)), l)
