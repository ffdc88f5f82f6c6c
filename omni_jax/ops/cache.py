"""The key/value cache of a decoder stack: one array for keys, one for values, and a length per row.

A row has `capacity` slots, which hold its tokens in order: a slot is valid when its index is below the row's length, so
rolling back is setting `length`, and rows of one batch may have different lengths. Arrays are [L, B, K, S, H]: a
layer's keys are contiguous per head, which is the order that attention reads. The cache travels in a scan's carry and
is donated, so XLA updates it in place.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax.sharding import constrain, constrain_rows, per_shard, platform

# The smallest capacity, in tokens.
MIN_CAPACITY = 256
# Logical axes of keys and values.
CACHE_AXES = ("layers", "batch", "kv_heads", None, "head_dim")


def capacity_for(tokens: int) -> int:
    """The capacity for `tokens` tokens: a power of two from 256 on, so that few sizes are ever compiled."""
    return max(MIN_CAPACITY, 1 << (tokens - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """k and v [L, B, K, S, H]; length int32 [B], how many tokens each row holds; mesh: its devices, None for one."""

    k: jax.Array
    v: jax.Array
    length: jax.Array
    mesh: Mesh | None = field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        L, B, _, S, _ = self.k.shape
        return f"KVCache({L} layers, {B} rows of {S} slots, {self.k.dtype})"

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: Any,
        mesh: Mesh | None = None,
    ) -> "KVCache":
        """Keys and values of zeros, [layers, rows, kv_heads, capacity, head_dim], of which none is valid, on `mesh`."""
        shape = (layers, rows, kv_heads, capacity, head_dim)
        if mesh is not None:
            return _empty(shape=shape, dtype=jnp.dtype(dtype), mesh=mesh)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows,), jnp.int32))

    def laid_over(self, mesh: Mesh | None) -> "KVCache":
        """The same cache, inside `jit`, with its rows and heads on the devices of `mesh` that compute them."""
        return replace(
            self,
            k=constrain(self.k, CACHE_AXES, mesh),
            v=constrain(self.v, CACHE_AXES, mesh),
            length=constrain(self.length, ("batch",), mesh),
            mesh=mesh,
        )

    @property
    def rows(self) -> int:
        """B."""
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        """S, the most tokens that a row can hold."""
        return self.k.shape[3]

    def write(self, l: Any, k: jax.Array, v: jax.Array) -> "KVCache":
        """Put keys and values [B, T, K, H] of layer `l` into the T slots after each row's length (not advancing it)."""

        def written(buffer: jax.Array, new: jax.Array) -> jax.Array:
            new_axes = ("batch", None, "kv_heads", "head_dim")
            return per_shard(
                _write, self.mesh, (buffer, CACHE_AXES), (l, ()), (new, new_axes), (self.length, ("batch",))
            )

        return replace(self, k=_in_order(written(self.k, k)), v=_in_order(written(self.v, v)))

    def advance(self, tokens: jax.Array | int) -> "KVCache":
        """Count `tokens` (int32 [B] or one number) more slots as valid."""
        return replace(self, length=self.length + tokens)

    def pick(self, nodes: jax.Array) -> "KVCache":
        """Of the slots after each row's length keep those numbered `nodes` int32 [B, T], moved together in order."""

        def picked(buffer: jax.Array) -> jax.Array:
            return per_shard(
                _pick, self.mesh, (buffer, CACHE_AXES), (nodes, ("batch", None)), (self.length, ("batch",))
            )

        return replace(self, k=picked(self.k), v=picked(self.v))

    def repeat(self, times: int) -> "KVCache":
        """A cache [L, B * times, K, S, H]: each row `times` times, side by side."""
        k, v = (jnp.repeat(buffer, times, axis=1) for buffer in (self.k, self.v))
        return replace(self, k=k, v=v, length=jnp.repeat(self.length, times))

    def insert(self, row: "KVCache", b: jax.Array | int) -> "KVCache":
        """The same with `row`, [L, 1, K, S', H] of at most this capacity, in place of row `b` (int32 [] or a number).

        What the former row has in slots that the new one lacks stays there; it is not valid, so nothing reads it.
        """

        def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(buffer, new, (0, b, 0, 0, 0))

        return replace(self, k=put(self.k, row.k), v=put(self.v, row.v), length=self.length.at[b].set(row.length[0]))

    def take(self, b: jax.Array | int, capacity: int) -> "KVCache":
        """The first `capacity` slots of row `b` (int32 [] or a number): a cache [L, 1, K, capacity, H]."""

        def part(buffer: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(buffer[:, :, :, :capacity], b, 1, axis=1)

        return replace(self, k=part(self.k), v=part(self.v), length=jax.lax.dynamic_slice_in_dim(self.length, b, 1))

    def rewind(self, length: jax.Array | int, capacity: int) -> "KVCache":
        """A cache of `capacity` slots that holds the first `length` tokens (int32 [] or a number) of each row."""
        more = max(0, capacity - self.capacity)

        def part(buffer: jax.Array) -> jax.Array:
            return jnp.pad(buffer[:, :, :, :capacity], [(0, 0)] * 3 + [(0, more), (0, 0)])

        return replace(self, k=part(self.k), v=part(self.v), length=jnp.full_like(self.length, length))

    def grow(self, capacity: int) -> "KVCache":
        """The same content with at least `capacity` slots, outside `jit`; this cache cannot be used afterwards.

        A buffer cannot become larger in place, so keys and values move one after the other. Where the capacity doubles,
        a device then holds at most 5/4 of the new cache's size; moving both at once would take 6/4.
        """
        if capacity <= self.capacity:
            return self
        return replace(self, k=_moved(self.k, capacity, self.mesh), v=_moved(self.v, capacity, self.mesh))


def lay_over(tree: Any, mesh: Mesh | None) -> Any:
    """A decoding state on the devices of `mesh`, inside `jit`: its caches, and all other arrays [B, ...] by rows.

    A program that returns its state like this can take it again without copies and without another compilation.
    """

    def laid(x: Any) -> Any:
        return x.laid_over(mesh) if isinstance(x, KVCache) else constrain_rows(x, mesh)

    return tree if mesh is None else jax.tree.map(laid, tree, is_leaf=lambda x: isinstance(x, KVCache))


@partial(jax.jit, static_argnames=("shape", "dtype", "mesh"))
def _empty(*, shape: tuple[int, int, int, int, int], dtype: Any, mesh: Mesh) -> KVCache:
    """`KVCache.empty` on several devices, of which none ever holds all of it."""
    return KVCache.empty(*shape, dtype).laid_over(mesh)


@partial(jax.jit, static_argnames=("capacity", "mesh"))
def lengthen(buffer: jax.Array, *, capacity: int, mesh: Mesh | None) -> jax.Array:
    """Keys or values [L, B, K, S, H] with `capacity` slots: [L, B, K, capacity, H]."""
    return constrain(jnp.pad(buffer, [(0, 0)] * 3 + [(0, capacity - buffer.shape[3]), (0, 0)]), CACHE_AXES, mesh)


def _moved(buffer: jax.Array, capacity: int, mesh: Mesh | None) -> jax.Array:
    """A longer copy of buffer [L, B, K, S, H], once it is complete; the buffer's memory is free then."""
    longer = jax.block_until_ready(lengthen(buffer, capacity=capacity, mesh=mesh))
    buffer.delete()
    return longer


def _in_order(buffer: jax.Array) -> jax.Array:
    """The same buffer, kept in memory in the order of its axes.

    XLA on GPU prefers the slots of a row's keys innermost, which suits the product with several queries, and would
    transpose the whole cache to that order and back around every loop.
    """
    if platform() == "cpu":
        return buffer
    from jax.experimental.layout import Layout, with_layout_constraint

    return with_layout_constraint(buffer, Layout(tuple(range(buffer.ndim))))


def _pick(buffer: jax.Array, nodes: jax.Array, length: jax.Array) -> jax.Array:
    slot = length[:, None] + nodes
    kept = jnp.take_along_axis(buffer, slot[None, :, None, :, None], axis=3)
    for b in range(len(nodes)):
        buffer = jax.lax.dynamic_update_slice(buffer, kept[:, b : b + 1], (0, b, 0, length[b], 0))
    return buffer


def _write(buffer: jax.Array, l: Any, new: jax.Array, length: jax.Array) -> jax.Array:
    B, T, *_ = new.shape
    if B == 1:
        # One contiguous update: a scatter of one window would be expanded to a loop on CPU.
        update = new.transpose(0, 2, 1, 3)[None].astype(buffer.dtype)
        return jax.lax.dynamic_update_slice(buffer, update, (l, 0, 0, length[0], 0))
    slot = length[:, None] + jnp.arange(T)
    return buffer.at[l, jnp.arange(B)[:, None], :, slot].set(new.astype(buffer.dtype), mode="drop")
