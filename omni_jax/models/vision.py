"""The vision encoder: patches of images and video frames to tokens of the text model.

Data flow: `inputs` packs each frame as one padded row of flattened patches -> patch embedding + interpolated position
embedding -> blocks with rotary (height, width) positions -> 2 x 2 patches merge into one token of the text model's
width; the outputs of a few layers ("deepstack") are merged likewise, for the text model's first layers to add.

Source: transformers `Qwen3OmniMoeVisionEncoder`. Deliberate differences: a frame is a row, so frames cannot attend to
each other; positions are computed from the (traced) grid inside `jit`, so pictures of any size share one program; the
reference's two orders of the merger (norm before or after the shuffle) are one module with two norm widths.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.config import VisionConfig
from omni_jax.models.encoder import EncoderBlocks, Rotary
from omni_jax.models.param import LayerNorm, Linear, Module, param
from omni_jax.ops.gelu import gelu_exact, gelu_tanh

# Constants of the architecture: no config.json states them.
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


def patch_positions(grid: jax.Array, patches: int, merge: int) -> jax.Array:
    """Row and column of every patch: grid int32 [R, 2] in patches -> int32 [R, P, 2], in merge-block order.

    The order is (block row, block column, row in block, column in block): the merge^2 patches of one token are
    neighbours. Positions beyond height x width are outside the picture.
    """
    index = jnp.arange(patches)
    block, inner = index // merge**2, index % merge**2
    blocks_wide = jnp.maximum(grid[:, 1:] // merge, 1)
    row = block // blocks_wide * merge + inner // merge
    col = block % blocks_wide * merge + inner % merge
    return jnp.stack([row, col], axis=-1)


def rotary_angles(positions: jax.Array, head_dim: int) -> Rotary:
    """Cos and sin, float32 [R, P, H], of patch positions [R, P, 2]: H/4 row angles, H/4 column angles, then again."""
    rates = jnp.asarray(ROPE_THETA ** (-np.arange(0, head_dim // 2, 2) / (head_dim // 2)), jnp.float32)
    R, P, _ = positions.shape
    angles = (positions[..., None].astype(jnp.float32) * rates).reshape(R, P, head_dim // 2)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def interpolate_positions(table: jax.Array, positions: jax.Array, grid: jax.Array) -> jax.Array:
    """Resample the square position table [N, D] to each row's grid, bilinearly with aligned corners: float32 [R, P, D].

    The first and last patch of a side sit exactly on the table's edges; a side of one patch sits on the first entry.
    """
    side = round(table.shape[0] ** 0.5)
    # Cast first: an integer times a Python float is weakly typed, and a bfloat16 table would round the shares.
    source = positions.astype(jnp.float32) * (side - 1) / jnp.maximum(grid[:, None, :] - 1, 1)
    low = jnp.floor(source)
    high_share = source - low
    low = jnp.clip(low.astype(jnp.int32), 0, side - 1)
    high = jnp.minimum(low + 1, side - 1)
    (top, left), (bottom, right) = (jnp.moveaxis(tap, -1, 0) for tap in (low, high))
    down, across = high_share[..., :1], high_share[..., 1:]
    return (
        table[top * side + left] * ((1 - down) * (1 - across))
        + table[top * side + right] * ((1 - down) * across)
        + table[bottom * side + left] * (down * (1 - across))
        + table[bottom * side + right] * (down * across)
    )


class PatchMerger(Module):
    """Project each group of merge^2 neighbouring patches to one token of the text model's width.

    `norm_width` D normalises every patch by itself (before the shuffle), merge^2 D the group as a whole (after it).
    """

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig, norm_width: int, layers: int | None = None):
        group = config.hidden_size * config.spatial_merge_size**2
        self.norm_width, self.group = norm_width, group
        self.norm = LayerNorm(rngs, norm_width, NORM_EPS, layers)
        self.fc1 = Linear(rngs, (group, group), ("mlp", "embed"), layers)
        self.fc2 = Linear(rngs, (config.out_hidden_size, group), ("embed", "mlp"), layers)

    @jax.named_scope("merger")
    def __call__(self, x: jax.Array, l: int | None = None) -> jax.Array:
        """[R, P, D] in merge-block order -> [R, P / merge^2, out]; `l` picks the merger of a stack."""
        R = x.shape[0]
        x = self.norm(x.reshape(R, -1, self.norm_width), l).reshape(R, -1, self.group)
        return self.fc2(gelu_exact(self.fc1(x, l)), l)


class VisionEncoder(Module):
    """Rows of patches, one row a frame, to text-model tokens and deepstack features."""

    def __init__(self, rngs: nnx.Rngs, config: VisionConfig):
        D, taps = config.hidden_size, config.deepstack_layers
        self.config = config
        self.patch_embed = Linear(rngs, (D, config.patch_dim), ("embed", None))
        self.pos_embed = param(rngs, (config.num_position_embeddings, D), (None, "embed"), scale=D**-0.5)
        self.blocks = EncoderBlocks(
            rngs,
            layers=config.num_layers,
            width=D,
            heads=config.num_heads,
            mlp=config.intermediate_size,
            eps=NORM_EPS,
            activation=gelu_tanh,
        )
        self.merger = PatchMerger(rngs, config, norm_width=D)
        self.deepstack = PatchMerger(rngs, config, norm_width=D * config.spatial_merge_size**2, layers=len(taps))

    @jax.named_scope("vision")
    def __call__(self, patches: jax.Array, grid: jax.Array, remat: bool = False) -> tuple[jax.Array, jax.Array]:
        """Encode frames: patches [R, P, patch_dim] and grid int32 [R, 2] -> tokens and deepstack features.

        patches: each row one frame in merge-block order, padded to P, a multiple of merge^2; any float dtype, computed
        in that of the parameters. grid: height and width in patches, (0, 0) for a padding row. Both outputs hold one
        token per merge^2 patches, [R, P / merge^2, out] and [n, R, P / merge^2, out] with n deepstack layers in the
        order of depth; tokens of padding are meaningless but finite. remat: as in `EncoderBlocks`.
        """
        merge, head_dim = self.config.spatial_merge_size, self.config.hidden_size // self.config.num_heads
        positions = patch_positions(grid, patches.shape[1], merge)
        x = self.patch_embed(patches.astype(self.patch_embed.weight[...].dtype))
        x = x + interpolate_positions(self.pos_embed[...], positions, grid).astype(x.dtype)
        taps = tuple(sorted(self.config.deepstack_layers))
        x, tapped = self.blocks(x, grid[:, 0] * grid[:, 1], rotary_angles(positions, head_dim), taps, remat)
        # The k-th merger belongs to the k-th layer that config.json names; features leave in the order of depth.
        mergers = jnp.asarray(np.argsort(self.config.deepstack_layers), jnp.int32)
        return self.merger(x), jax.lax.map(lambda tap: self.deepstack(tap[1], tap[0]), (mergers, tapped))
