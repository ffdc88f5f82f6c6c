"""A prompt that runs in pieces, so that the tokens of others need not wait for all of it.

    prompt -> piece, piece, ... -> last piece: first token, state     (each after what the cache already holds)

Every piece but the last has the same number of tokens, and the last is padded to one of few sizes. Positions, the
features of media and deepstack features are those of the whole prompt, cut at the same places.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax.decode.prompt import pad_length
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.models.thinker import Media
from omni_jax.sharding import place, place_rows

# Tokens of a piece by default.
PIECE = 512
# The sizes of a last piece, as parts of a whole one.
PARTS = (16, 4, 1)


@dataclass(frozen=True)
class Piece:
    """Tokens from number `start` on, of which `count` are real; padded, they end before number `stop`."""

    start: int
    stop: int
    count: int

    def of(self, batch: Batch) -> Batch:
        """The piece of a batch of one row."""
        end = self.start + self.count
        names = ("token_ids", "mask", "visual_index", "audio_index")
        cut = {name: getattr(batch, name)[:, self.start : end] for name in names}
        part = replace(batch, position_ids=batch.position_ids[:, :, self.start : end], **cut)
        return pad_length(part, self.stop - self.start)

    def placed(self, part: Batch, mesh: Mesh | None) -> tuple[Any, Any]:
        """The token ids [1, T] and positions [3, 1, T] of the piece, on the devices of `mesh`."""
        return place_rows(part.token_ids, mesh), place(part.position_ids, (None, "batch", None), mesh)


def pieces_of(start: int, tokens: int, size: int | None) -> list[Piece]:
    """The pieces, of at most `size` tokens, of a prompt of `tokens` tokens from number `start` on; at least one.

    size: None for one piece, padded to a bucket.
    """
    if size is None:
        return [Piece(start, start + bucket(tokens - start), tokens - start)]
    pieces = [Piece(at, at + size, size) for at in range(start, tokens - size, size)]
    at = pieces[-1].stop if pieces else start
    padded = min(max(1, size // part) for part in PARTS if max(1, size // part) >= tokens - at)
    return [*pieces, Piece(at, at + padded, tokens - at)]


def media_of(media: Media | None, part: Batch, mesh: Mesh | None) -> Media | None:
    """The media of a whole prompt, for a piece of it."""
    if media is None:
        return None
    return replace(media, **place_rows({n: getattr(part, n) for n in ("visual_index", "audio_index")}, mesh))


class Tapped:
    """Hidden states of tokens in a row, [n, 1, T, D] with T bucketed, as their pieces give them; None without any."""

    def __init__(self, tokens: int):
        """tokens: that come at most."""
        self._size = bucket(tokens)
        self.states: jax.Array | None = None

    def put(self, states: jax.Array, start: int) -> None:
        """Take in those of tokens from number `start` on, [n, 1, T, D]."""
        if not len(states):
            return
        if self.states is None:
            self.states = _room(states, size=self._size)
        # Of more than there is room for, the last are of no token.
        self.states = _put(self.states, states[:, :, : self._size], np.int32(start))


@partial(jax.jit, static_argnames="size")
def _room(states: jax.Array, *, size: int) -> jax.Array:
    n, B, _, D = states.shape
    return jnp.zeros((n, B, size, D), states.dtype)


@partial(jax.jit, donate_argnames="states")
def _put(states: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_slice(states, new, (0, 0, start, 0))
