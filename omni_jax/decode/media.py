"""From prepared NumPy rows to encoded media on the device.

Each bucket of vision rows and the audio windows are one compiled call; a new prompt recompiles only when it needs a
bucket that was not seen before.
"""

from functools import partial

import jax
import jax.numpy as jnp

from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Graph, bind
from omni_jax.models.thinker import Media


@partial(jax.jit, static_argnames="graph")
def encode_vision(params: dict, patches: jax.Array, grid: jax.Array, *, graph: Graph) -> tuple[jax.Array, jax.Array]:
    """Frames [R, P, patch_dim] with grid int32 [R, 2] -> tokens [R * P / m^2, D] and deepstack [n, R * P / m^2, D]."""
    tokens, deepstack = bind(graph, params).vision(patches, grid)
    return tokens.reshape(-1, tokens.shape[-1]), deepstack.reshape(deepstack.shape[0], -1, deepstack.shape[-1])


@partial(jax.jit, static_argnames="graph")
def encode_audio(params: dict, mel: jax.Array, frames: jax.Array, width: jax.Array, *, graph: Graph) -> jax.Array:
    """Windows mel [W, C, M, F] with frames and width int32 [W, C] -> tokens [W * C * 13, D]."""
    tokens = bind(graph, params).audio(mel, frames, width)
    return tokens.reshape(-1, tokens.shape[-1])


def encode_media(params: dict, batch: Batch, graph: Graph) -> Media | None:
    """Encode all media of a batch, or None for text alone."""
    if not batch.vision and batch.audio is None:
        return None
    visual = deepstack = audio = None
    if batch.vision:
        groups = [encode_vision(params, rows.patches, rows.grid, graph=graph) for rows in batch.vision]
        visual, deepstack = groups[0] if len(groups) == 1 else _join(groups)
    if batch.audio is not None:
        audio = encode_audio(params, batch.audio.mel, batch.audio.frames, batch.audio.width, graph=graph)
    return Media(visual, deepstack, audio, jnp.asarray(batch.visual_index), jnp.asarray(batch.audio_index))


def _join(groups: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    tokens, deepstack = zip(*groups, strict=True)
    return jnp.concatenate(tokens), jnp.concatenate(deepstack, axis=1)
