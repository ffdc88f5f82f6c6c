"""The largest of a vocabulary, which a GPU finds without sorting all of it."""

import jax
import jax.numpy as jnp

from omni_jax.sharding import platform

# Numbers that a GPU sorts in one kernel, and those of a row up to which it sorts all of it: a vocabulary of codes.
BLOCK, SORTED = 2048, 4096


def top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of x [..., V], in descending order, and their places int32, both [..., count].

    Of equal ones the first come first. As `jax.lax.top_k`, for which XLA on GPU sorts every row whole.
    """
    whole = platform() == "cpu" or x.shape[-1] <= SORTED or 2 * count > BLOCK
    return jax.lax.top_k(x, count) if whole else by_blocks(x, count, BLOCK)


def by_blocks(x: jax.Array, count: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The same: the largest of each block go on, until there is one block, which has at least 2 * count numbers."""
    rows, V = x.shape[:-1], x.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), x.shape)
    while (size := x.shape[-1]) > block:
        more = [(0, 0)] * len(rows) + [(0, -size % block)]
        x, at = jax.lax.top_k(jnp.pad(x, more, constant_values=-jnp.inf).reshape(*rows, -1, block), count)
        ids = jnp.take_along_axis(jnp.pad(ids, more).reshape(*rows, -1, block), at, axis=-1)
        x, ids = x.reshape(*rows, -1), ids.reshape(*rows, -1)
    x, at = jax.lax.top_k(x, count)
    return x, jnp.take_along_axis(ids, at, axis=-1)
