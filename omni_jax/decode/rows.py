"""Rows of whatever a decoding loop carries: text, drafted text or speech.

A state is a pytree whose arrays have rows first, except caches, which know their own rows; `text.Rows` in it says which
rows are done.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decode.text import Rows
from omni_jax.ops.cache import KVCache, lay_over
from omni_jax.sharding import Array, place_rows


@partial(jax.jit, static_argnames="rows")
def idle(state: Any, *, rows: int) -> Any:
    """A state of `rows` rows that are all done, shaped like `state` of one row."""

    def repeat(leaf: Any) -> Any:
        return leaf.repeat(rows) if isinstance(leaf, KVCache) else jnp.repeat(leaf, rows, axis=0)

    def finish(leaf: Any) -> Any:
        return replace(leaf, done=jnp.ones((rows,), bool)) if isinstance(leaf, Rows) else leaf

    repeated = jax.tree.map(repeat, state, is_leaf=lambda leaf: isinstance(leaf, KVCache))
    return laid(jax.tree.map(finish, repeated, is_leaf=lambda leaf: isinstance(leaf, Rows)))


@partial(jax.jit, donate_argnames="state")
def insert(state: Any, row: Any, b: jax.Array | int) -> Any:
    """The state [B, ...] with `row`, a state of one row, in place of its row `b`, int32 [].

    Whatever a decoding loop carries has its rows first, except caches, which put rows in themselves.
    """

    def put(leaf: Any, new: Any) -> Any:
        return leaf.insert(new, b) if isinstance(leaf, KVCache) else leaf.at[b].set(new[0])

    return laid(jax.tree.map(put, state, row, is_leaf=lambda leaf: isinstance(leaf, KVCache)))


def note_seen(state: Any, tokens: int) -> Any:
    """What a decoding loop carries, whose rows note which of `tokens` tokens have occurred, or none (0).

    Rows that noted none begin with none: they have no penalty. Outside `jit`.
    """

    def noting(leaf: Any) -> Any:
        if not isinstance(leaf, Rows) or leaf.seen.shape[1] == tokens:
            return leaf
        seen = np.zeros((len(leaf.done), tokens), bool)
        return replace(leaf, seen=place_rows(seen, caches_of(state)[0].mesh))

    return jax.tree.map(noting, state, is_leaf=lambda leaf: isinstance(leaf, Rows | KVCache))


def noting_alike(state: Any, row: Any) -> tuple[Any, Any]:
    """Two states of which one is to be put into the other, noting occurred tokens both or neither."""
    tokens = max(leaf.seen.shape[1] for leaf in (*rows_of(state), *rows_of(row)))
    return note_seen(state, tokens), note_seen(row, tokens)


def rows_of(state: Any) -> list[Rows]:
    """What is known of the rows of what a decoding loop carries."""
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, Rows))
    return [leaf for leaf in leaves if isinstance(leaf, Rows)]


@partial(jax.jit, static_argnames="capacity")
def take(state: Any, b: jax.Array | int, *, capacity: int) -> Any:
    """A copy of row `b`, int32 [], of caches and arrays [B, ...]: of caches the first `capacity` slots, if so many."""

    def part(leaf: Any) -> Any:
        if isinstance(leaf, KVCache):
            return leaf.take(b, min(capacity, leaf.capacity))
        return jax.lax.dynamic_slice_in_dim(leaf, b, 1)

    return laid(jax.tree.map(part, state, is_leaf=lambda leaf: isinstance(leaf, KVCache)))


@partial(jax.jit, static_argnames="capacity")
def rewind(state: Any, length: jax.Array | int, *, capacity: int) -> Any:
    """A copy of caches and arrays of one row, whose caches hold the first `length` tokens in `capacity` slots."""

    def part(leaf: Any) -> Any:
        return leaf.rewind(length, capacity) if isinstance(leaf, KVCache) else leaf

    return laid(jax.tree.map(part, state, is_leaf=lambda leaf: isinstance(leaf, KVCache)))


def caches_of(state: Any) -> list[KVCache]:
    """The caches of what a decoding loop carries."""
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, KVCache))
    return [leaf for leaf in leaves if isinstance(leaf, KVCache)]


def capacity_of(state: Any) -> int:
    """The positions that the largest cache of a decoding loop has."""
    return max(cache.capacity for cache in caches_of(state))


def laid(state: Any) -> Any:
    """What a decoding loop carries, on the devices of its caches' mesh, inside `jit`."""
    return lay_over(state, caches_of(state)[0].mesh)


@partial(jax.jit, donate_argnames="state")
def retire(state: Any, b: Array | int) -> Any:
    """What a decoding loop carries, with row `b`, int32 [], done."""

    def finish(leaf: Any) -> Any:
        return replace(leaf, done=leaf.done.at[b].set(True)) if isinstance(leaf, Rows) else leaf

    return laid(jax.tree.map(finish, state, is_leaf=lambda leaf: isinstance(leaf, Rows)))
