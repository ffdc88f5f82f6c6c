"""From prepared NumPy rows to encoded media on the device.

Each bucket of vision rows and the audio windows are one compiled call, and their results are padded to a bucketed
number of tokens: a new prompt recompiles only when it needs a bucket that was not seen before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax.decode.keeping import Store
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.models.audio import AudioEncoder
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Media
from omni_jax.models.vision import VisionEncoder
from omni_jax.sharding import place, place_rows

# Patches that the vision encoder takes at once; more rows go through a loop, so that videos need no more memory.
MAX_PATCHES = 1 << 15


@partial(jax.jit, static_argnames="declaration")
def encode_vision(
    params: dict, patches: jax.Array, grid: jax.Array, *, declaration: Declaration
) -> tuple[jax.Array, jax.Array]:
    """Frames [R, P, patch_dim] with grid int32 [R, 2] -> tokens [R * P / m^2, D] and deepstack [n, R * P / m^2, D]."""
    return see(bind(declaration, params).vision, patches, grid)


@partial(jax.jit, static_argnames="declaration")
def encode_audio(
    params: dict, mel: jax.Array, frames: jax.Array, width: jax.Array, *, declaration: Declaration
) -> jax.Array:
    """Windows mel [W, C, M, F] with frames and width int32 [W, C] -> tokens [W * C * 13, D]."""
    return hear(bind(declaration, params).audio, mel, frames, width)


def see(vision: VisionEncoder, patches: jax.Array, grid: jax.Array, remat: bool = False) -> tuple[jax.Array, jax.Array]:
    """Frames [R, P, patch_dim] with grid int32 [R, 2], as `encode_vision`, inside a program.

    remat: whether a backward pass computes layers anew instead of keeping what they made.
    """
    R, P, _ = patches.shape
    if R * P <= MAX_PATCHES:
        tokens, deepstack = vision(patches, grid, remat)
    else:

        def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return jax.tree.map(lambda x: x.squeeze(-3), vision(row[0][None], row[1][None], remat))

        rows = max(1, MAX_PATCHES // P)
        tokens, deepstack = jax.lax.map(jax.checkpoint(one) if remat else one, (patches, grid), batch_size=rows)
        deepstack = jnp.moveaxis(deepstack, 0, 1)
    return tokens.reshape(-1, tokens.shape[-1]), deepstack.reshape(deepstack.shape[0], -1, deepstack.shape[-1])


def hear(audio: AudioEncoder, mel: jax.Array, frames: jax.Array, width: jax.Array, remat: bool = False) -> jax.Array:
    """Windows mel [W, C, M, F] with frames and width int32 [W, C], as `encode_audio`; remat: as in `see`."""
    tokens = audio(mel, frames, width, remat)
    return tokens.reshape(-1, tokens.shape[-1])


def encode_media(params: dict, batch: Batch, declaration: Declaration, store: Store | None = None) -> Media | None:
    """Encode all media of a batch, or None for text alone. store: keeps features, and has those of earlier batches."""
    if not batch.vision and batch.audio is None:
        return None
    visual = deepstack = audio = None
    mesh = declaration.mesh
    if batch.vision:
        groups = [
            _kept(store, (rows.patches, rows.grid), partial(encode_vision, params, declaration=declaration), mesh)
            for rows in batch.vision
        ]
        tokens, features = zip(*groups, strict=True)
        size = bucket(sum(x.shape[0] for x in tokens))
        visual, deepstack = _join(tokens, axis=0, size=size), _join(features, axis=1, size=size)
    if batch.audio is not None:
        windows = (batch.audio.mel, batch.audio.frames, batch.audio.width)
        heard = _kept(store, windows, partial(encode_audio, params, declaration=declaration), mesh)
        audio = _join((heard,), axis=0, size=bucket(heard.shape[0]))
    # Any row of a batch may hold any feature.
    visual, deepstack, audio = (
        x if x is None else place(x, (None,) * x.ndim, mesh) for x in (visual, deepstack, audio)
    )
    index = place_rows((jnp.asarray(batch.visual_index), jnp.asarray(batch.audio_index)), mesh)
    return Media(visual, deepstack, audio, *index)


def _kept(store: Store | None, arrays: tuple[np.ndarray, ...], encode: Callable[..., Any], mesh: Mesh | None) -> Any:
    """What `encode` makes of arrays [R, ...], from the store if that has it."""

    def encoded() -> Any:
        return encode(*place_rows(arrays, mesh))

    return encoded() if store is None else store.features(arrays, encoded)


@partial(jax.jit, static_argnames=("axis", "size"))
def _join(groups: tuple[jax.Array, ...], *, axis: int, size: int) -> jax.Array:
    """Concatenate along `axis` and pad with zeros to `size`."""
    joined = jnp.concatenate(groups, axis)
    pad = [(0, size - n if i == axis else 0) for i, n in enumerate(joined.shape)]
    return jnp.pad(joined, pad)
