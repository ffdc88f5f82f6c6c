"""Media of a training batch, encoded inside the program, so that encoders can be trained with what reads them."""

from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.decode.media import hear, see
from omni_jax.models.thinker import Media, Thinker
from omni_jax.sharding import replicate
from omni_jax.train.batch import MediaRows


def encode(thinker: Thinker, rows: MediaRows, remat: bool = False) -> Media:
    """Media rows through the encoders; remat: whether a backward pass computes layers anew instead of keeping them."""
    visual = deepstack = audio = None
    given: Any = jax.tree.map(jnp.asarray, rows)
    # Any row of a batch may hold any feature.
    mesh = thinker.layers.mesh
    if given.vision:
        seen = [see(thinker.vision, patches, grid, remat) for patches, grid in given.vision]
        tokens, features = zip(*seen, strict=True)
        visual, deepstack = replicate(jnp.concatenate(tokens), mesh), replicate(jnp.concatenate(features, 1), mesh)
    if given.audio is not None:
        mel, frames, width = given.audio
        audio = replicate(hear(thinker.audio, mel, frames, width, remat), mesh)
    return Media(visual, deepstack, audio, given.visual_index, given.audio_index)
