"""What the losses of drafters read of the target: hidden states of whole rows, its embedding and its head.

The target is frozen: it is run in the program of the loss or, once for all epochs, beforehand (`drafters.stored`).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Thinker
from omni_jax.sharding import Array
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.media import encode


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ends:
    """The target's embedding and head, both [V, D]; one array where they are tied."""

    embed: jax.Array
    head: jax.Array


def ends_of(params: dict) -> Ends:
    """Embedding and head of a Thinker's parameters."""
    return Ends(params["embed"], params.get("lm_head", params["embed"]))


def hidden_states(params: dict, batch: TextBatch, taps: tuple[int, ...], *, declaration: Declaration) -> jax.Array:
    """The target's hidden states of a batch by their numbers, [n, B, T, D], without a gradient.

    params, declaration: the Thinker's. taps: as of `Thinker.forward`; the number of layers is the state that the head
    reads.
    """
    thinker: Thinker = bind(declaration, params)
    media = None if batch.media is None else encode(thinker, batch.media)
    x = thinker.embed_tokens(jnp.asarray(batch.token_ids), media)
    position_ids, first_seen = jnp.asarray(batch.position_ids), jnp.asarray(batch.first_seen)
    return jax.lax.stop_gradient(thinker.forward(x, position_ids, first_seen, media, taps).taps)


def places(first_seen: Array) -> jax.Array:
    """The index of each token in its sample, int32 [B, T], from that of its first token in the row."""
    return jnp.arange(first_seen.shape[1]) - jnp.asarray(first_seen)


def learned_ahead(batch: TextBatch, index: jax.Array, ahead: Array) -> tuple[jax.Array, jax.Array]:
    """The tokens `ahead` int [W] after those at `index` int32 [B, A], and whether they are to be learned: [B, A, W].

    A token beyond the row or of another sample is not.
    """
    labels, first_seen = jnp.asarray(batch.labels), jnp.asarray(batch.first_seen)
    T = labels.shape[1]
    at = index[..., None] + jnp.asarray(ahead)
    kept, rows = jnp.minimum(at, T - 1), jnp.arange(len(labels))[:, None, None]
    same = first_seen[rows, kept] == jnp.take_along_axis(first_seen, index, axis=1)[..., None]
    return jnp.asarray(batch.token_ids)[rows, kept], (at < T) & same & (labels[rows, kept] != IGNORED)


def accepted(right: jax.Array, asked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What drafts would give, by how many are right: float32 [W] and [].

    right, asked: bool [..., W], whether draft number i is right, and whether it is known what is right. First, how
    often draft i is right; second, tokens per round: one of the target's own, and drafts before the first wrong one.
    """
    over = tuple(range(right.ndim - 1))

    def share(hits: jax.Array, of: jax.Array) -> jax.Array:
        return jnp.sum(hits & of, axis=over) / jnp.maximum(jnp.sum(of, axis=over), 1)

    reached = jnp.cumprod(asked, axis=-1).astype(bool)
    alive = jnp.cumprod(right & asked, axis=-1).astype(bool)
    return share(right, asked), 1 + jnp.sum(share(alive, reached))


def in_chunks(function: Any, arrays: Any, most: int) -> Any:
    """`function` over a few columns of arrays [B, N, ...] at a time, about `most` places; each part is computed anew.

    Rows stay side by side, so that devices that hold some rows each compute these alone.
    """
    B, N = jax.tree.leaves(arrays)[0].shape[:2]
    chunks = -(-N // max(1, most // B))
    size = -(-N // chunks)  # Few columns are not padded, and of several parts none is mostly padding.

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * size - N)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, chunks, size, *x.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(function), jax.tree.map(cut, arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, chunks * size, *x.shape[3:])[:, :N], out)
