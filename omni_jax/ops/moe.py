"""Routed experts with one signature: each row passes through its few chosen experts and nothing else is computed.

    rows [R, D] -> route -> Routing (ids and weights [R, A]) -> moe, over the ExpertWeights of all layers -> rows [R, D]

Weights stay stacked over layers and are indexed by layer and expert together: slicing out one layer first would copy
all of its experts at every step on CPU.

Which way is fastest depends on the rows and the platform: a few rows loop over (row, expert) pairs on CPU and fuse a
gather, a product and a sum on GPU; many rows are sorted by expert and cut into tiles of one expert each on CPU, and go
through a grouped matrix product (tokamax) on GPU. `jax.lax.ragged_dot` is not used: on CPU it computes every expert for
every row. Tiles have a backward pass of their own: derived by JAX, it would keep a copy of an expert's weights for each
tile.

Source: transformers `Qwen3OmniMoeThinkerTextSparseMoeBlock`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.sharding import platform

# Rows up to which looping over (row, expert) pairs is faster on CPU, and gathering the experts' weights on GPU.
PAIR_ROWS = 4
GPU_GATHER_ROWS = 3
# A tile has 1 to TILE_STEPS steps of rows, the number that its rows need, and a program for each number: more steps pad
# less and compile longer. A step's bounds: a product of fewer rows takes the same time, and one of over 512 rows leaves
# the CPU's caches.
TILE_STEPS = 8
STEP_ROWS = (8, 64)
# Widths that tokamax's Hopper kernel cuts into whole tiles.
GROUPED_MULTIPLE = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """The experts of each row: ids int32 [R, A], and what each of them counts, weights [R, A]."""

    ids: jax.Array
    weights: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """gate_up [L, E, D, 2, F] and down [L, E, F, D] of all layers, and the layer to take, int32 []."""

    gate_up: jax.Array
    down: jax.Array
    layer: jax.Array | int

    def flat(self) -> tuple[jax.Array, jax.Array, jax.Array | int]:
        """Layer and expert as one axis: gate_up [L * E, D, 2 F], down [L * E, F, D], the first index of the layer."""
        L, E, D, _, F = self.gate_up.shape
        return self.gate_up.reshape(L * E, D, 2 * F), self.down.reshape(L * E, F, D), self.layer * E


def route(x: jax.Array, router: jax.Array, experts_per_token: int, normalise: bool) -> Routing:
    """Choose experts for rows x [R, D] by router [E, D]; weights are in x's dtype, with a sum of 1 if normalised."""
    weights, ids = jax.lax.top_k(router_probabilities(x, router), experts_per_token)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(ids, weights.astype(x.dtype))


def router_probabilities(x: jax.Array, router: jax.Array) -> jax.Array:
    """The probability float32 [R, E] of each expert for rows x [R, D], by router [E, D]."""
    logits = jnp.einsum("RD,ED->RE", x, router, preferred_element_type=jnp.float32).astype(x.dtype)
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def moe(x: jax.Array, routing: Routing, experts: ExpertWeights) -> jax.Array:
    """Weighted sum over the experts of each row x [R, D] of down(silu(gate(x)) * up(x)): [R, D] in x's dtype."""
    return partial_moe(x, routing, experts).astype(x.dtype)


def partial_moe(x: jax.Array, routing: Routing, experts: ExpertWeights, total: int | None = None) -> jax.Array:
    """As `moe`, float32 [R, D], of the experts that are here: an id of E is an expert elsewhere and adds nothing.

    total: the number of experts everywhere, by default the E that are here. All backends take these arguments.
    """
    if platform() == "cpu":
        backend = pairwise if x.shape[0] <= PAIR_ROWS else tiled
    else:
        backend = gathered if x.shape[0] <= GPU_GATHER_ROWS else grouped
    return backend(x, routing, experts, total)


def pairwise(x: jax.Array, routing: Routing, experts: ExpertWeights, total: int | None = None) -> jax.Array:
    """[R, D] -> float32 [R, D], one (row, expert) pair at a time: reads only chosen experts, for few rows on CPU."""
    ids, weights = routing.ids, routing.weights
    R, A = ids.shape
    E = experts.gate_up.shape[1]
    gate_up, down, first = experts.flat()

    def pair(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        row, choice = i // A, i % A

        def add(y: jax.Array) -> jax.Array:
            out = _expert(jax.lax.dynamic_slice_in_dim(x, row, 1), gate_up, down, first + ids[row, choice])
            return y.at[row].add(out[0] * weights[row, choice])

        # Where all experts are here, no condition is needed.
        return add(y) if total is None else jax.lax.cond(ids[row, choice] < E, add, lambda y: y, y), None

    return jax.lax.scan(pair, jnp.zeros(x.shape, jnp.float32), jnp.arange(R * A))[0]


def tiled(x: jax.Array, routing: Routing, experts: ExpertWeights, total: int | None = None) -> jax.Array:
    """[R, D] -> float32 [R, D], rows sorted by expert and cut into tiles of one expert each: many rows, any platform.

    Pairs of experts elsewhere are sorted after all others and are in no tile.
    """
    ids, (R, A) = routing.ids, routing.ids.shape
    E = experts.gate_up.shape[1]
    sizes = _tile_sizes(R, R * A // (total or E))
    order, start, rows, expert = _tile_plan(ids, E, sizes[-1])
    gate_up, down, first = experts.flat()
    # The last tile may reach beyond the last pair.
    source = jnp.pad(order // A, (0, sizes[-1]))
    out: Any = _tile_products(x[source], gate_up, down, (start, rows, first + expert), sizes)
    place = jnp.argsort(order).reshape(R, A)
    return jnp.einsum("RAD,RA->RD", _here(out[place], ids, E, total), routing.weights.astype(jnp.float32))


def _here(rows: jax.Array, ids: jax.Array, E: int, total: int | None) -> jax.Array:
    """Rows [R, A, D] of pairs, zeros for those of experts elsewhere."""
    return rows if total is None else jnp.where((ids < E)[..., None], rows, 0)


# In the order of the rows: each tile's first row among the sorted pairs, how many rows (none or less: unused), expert.
Tiles = tuple[jax.Array, jax.Array, jax.Array]


def _tile_sizes(R: int, share: int) -> tuple[int, ...]:
    """Rows that a tile may have, when R rows give each expert `share` on average.

    An average share takes four to eight steps, so that padding is small beside it.
    """
    step = min(max(1 << (share // TILE_STEPS).bit_length(), STEP_ROWS[0]), STEP_ROWS[1])
    sizes = tuple(step * n for n in range(1, min(TILE_STEPS, -(-R // step)) + 1))
    # On GPU the host waits for every condition, so there is one.
    return sizes if platform() == "cpu" else sizes[-1:]


def _tile_plan(ids: jax.Array, E: int, largest: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """For pairs ids [R, A]: their order by expert [R * A], and start, rows and expert of each tile."""
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    # Nothing is scattered: that is slow on CPU.
    counts = jnp.sum(flat[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    tiles = -(-counts // largest)
    last_tile = jnp.cumsum(tiles)
    tile = jnp.arange(flat.size // largest + min(E, flat.size))
    expert = jnp.minimum(jnp.sum(tile[:, None] >= last_tile, axis=1), E - 1)
    done = (tile - (last_tile - tiles)[expert]) * largest
    start = (jnp.cumsum(counts) - counts)[expert] + done
    return order, start, jnp.minimum(counts[expert] - done, largest), expert


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tile_products(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, tiles: Tiles, sizes: tuple[int, ...]
) -> jax.Array:
    """Each tile's rows of x [pairs + largest tile, D] through its expert, float32.

    A tile rounded up to its size also fills rows of the tiles after it, which these then replace.
    """

    def one(out: jax.Array, start: jax.Array, rows: jax.Array, e: jax.Array, size: int) -> jax.Array:
        y = _expert(jax.lax.dynamic_slice_in_dim(x, start, size), gate_up, down, e)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    return _each_tile(one, jnp.zeros(x.shape, jnp.float32), tiles, sizes)


def _tile_products_forward(
    x: jax.Array, gate_up: jax.Array, down: jax.Array, tiles: Tiles, sizes: tuple[int, ...]
) -> tuple:
    """The products, and for the backward pass what each tile's first product gave, [pairs + largest tile, 2 F]."""

    def one(carry: tuple, start: jax.Array, rows: jax.Array, e: jax.Array, size: int) -> tuple:
        w_in, w_out = _of_expert(gate_up, down, e)
        hidden = jnp.dot(jax.lax.dynamic_slice_in_dim(x, start, size), w_in, preferred_element_type=jnp.float32)
        y = jnp.dot(_gated(hidden, x.dtype), w_out, preferred_element_type=jnp.float32)
        made = y, hidden.astype(x.dtype)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_rows, some, start, 0)
            for all_rows, some in zip(carry, made, strict=True)
        )

    empty = jnp.zeros(x.shape, jnp.float32), jnp.zeros((len(x), gate_up.shape[2]), x.dtype)
    out, hidden = _each_tile(one, empty, tiles, sizes)
    return out, (x, gate_up, down, tiles, hidden)


def _tile_products_backward(sizes: tuple[int, ...], saved: tuple, cotangent: jax.Array) -> tuple:
    """Cotangents of x, gate_up and down: each tile's are added to its expert's in place."""
    x, gate_up, down, tiles, hidden = saved
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(carry: tuple, start: jax.Array, rows: jax.Array, e: jax.Array, size: int) -> tuple:
        dx, d_gate_up, d_down = carry
        x_rows, h, dy = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (x, hidden, cotangent))
        dy = jnp.where(jnp.arange(size)[:, None] < rows, dy, 0.0).astype(x.dtype)
        w_in, w_out = _of_expert(gate_up, down, e)
        inner, pull = jax.vjp(partial(_gated, dtype=x.dtype), h.astype(jnp.float32))
        (dh,) = pull(product("RD,FD->RF", dy, w_out).astype(x.dtype))
        dh = dh.astype(x.dtype)
        d_rows = product("RF,DF->RD", dh, w_in).astype(x.dtype)
        d_in, d_out = product("RD,RF->DF", x_rows, dh), product("RF,RD->FD", inner, dy)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, d_rows, start, 0)
        return dx, d_gate_up.at[e].add(d_in.astype(x.dtype)), d_down.at[e].add(d_out.astype(x.dtype))

    zeros = (jnp.zeros_like(x), jnp.zeros_like(gate_up), jnp.zeros_like(down))
    return *_each_tile(one, zeros, tiles, sizes), None


_tile_products.defvjp(_tile_products_forward, _tile_products_backward)


def _each_tile(one: Callable, carry: Any, tiles: Tiles, sizes: tuple[int, ...]) -> Any:
    """carry = one(carry, start, rows, expert, size) over the tiles in use, `size` being the smallest that holds one."""

    def step(carry: Any, tile: Tiles) -> tuple[Any, None]:
        start, rows, e = tile
        # One condition after the other, because XLA on CPU copies the carry where two branches of one change it.
        for below, size in zip((0, *sizes), sizes, strict=False):
            fits = (below < rows) & (rows <= size)
            carry = jax.lax.cond(fits, lambda c, size=size: one(c, start, rows, e, size), lambda c: c, carry)
        return carry, None

    return jax.lax.scan(step, carry, tiles)[0]


def gathered(x: jax.Array, routing: Routing, experts: ExpertWeights, total: int | None = None) -> jax.Array:
    """[R, D] -> float32 [R, D]: gather, multiply and sum as one fusion with no temporary, one to three rows on GPU.

    A pair of an expert elsewhere reads one that another pair reads too, which costs no memory traffic of its own.
    """
    ids, weights = routing.ids, routing.weights
    E, F = experts.gate_up.shape[1], experts.down.shape[2]
    flat_gate_up, flat_down, first = experts.flat()
    if total is not None:
        weights, ids = jnp.where(ids < E, weights, 0), jnp.where(ids < E, ids, jnp.min(ids) % E)
    rows = first + ids
    hidden = jnp.sum(x[:, None, :, None].astype(jnp.float32) * flat_gate_up[rows].astype(jnp.float32), axis=2)
    hidden = (jax.nn.silu(hidden[..., :F]) * hidden[..., F:]).astype(x.dtype)
    out = jnp.sum(hidden[..., None].astype(jnp.float32) * flat_down[rows].astype(jnp.float32), axis=2)
    return jnp.sum(out * weights[..., None].astype(jnp.float32), axis=1)


def grouped(x: jax.Array, routing: Routing, experts: ExpertWeights, total: int | None = None) -> jax.Array:
    """[R, D] -> float32 [R, D] by grouped products over sorted rows: many rows on GPU. `tiled` without a kernel."""
    ids, gate_up = routing.ids, experts.gate_up
    R, A = ids.shape
    _, E, D, _, F = gate_up.shape
    half = x.dtype in (jnp.bfloat16, jnp.float16) and x.dtype == gate_up.dtype
    if find_spec("tokamax") is None or not half or D % GROUPED_MULTIPLE or F % GROUPED_MULTIPLE:
        return tiled(x, routing, experts, total)
    import tokamax  # pyright: ignore[reportMissingImports]

    order = jnp.argsort(ids.reshape(-1), stable=True)
    counts = jnp.zeros(E, jnp.int32).at[ids.reshape(-1)].add(1)
    dot = partial(tokamax.ragged_dot, group_sizes=counts, implementation="mosaic", preferred_element_type=x.dtype)
    hidden = dot(x[order // A], gate_up[experts.layer].reshape(E, D, 2 * F))
    hidden = jax.nn.silu(hidden[:, :F]) * hidden[:, F:]
    out = dot(hidden, experts.down[experts.layer])
    # Gathered back by its inverse, the order costs no array of its own: scattering would fill one and write another.
    place = jnp.zeros(R * A, jnp.int32).at[order].set(jnp.arange(R * A, dtype=jnp.int32)).reshape(R, A)
    rows = _here(out[place], ids, E, total).astype(jnp.float32)
    return jnp.sum(rows * routing.weights[..., None].astype(jnp.float32), axis=1)


def _expert(rows: jax.Array, gate_up: jax.Array, down: jax.Array, e: Any) -> jax.Array:
    """One expert's MLP on rows [R, D], float32 out."""
    w_in, w_out = _of_expert(gate_up, down, e)
    hidden = _gated(jnp.dot(rows, w_in, preferred_element_type=jnp.float32), rows.dtype)
    return jnp.dot(hidden, w_out, preferred_element_type=jnp.float32)


def _of_expert(gate_up: jax.Array, down: jax.Array, e: Any) -> tuple[jax.Array, jax.Array]:
    """One expert's weights, [D, 2 F] and [F, D]."""
    w_in, w_out = (jax.lax.dynamic_index_in_dim(w, e, keepdims=False) for w in (gate_up, down))
    return w_in, w_out


def _gated(hidden: jax.Array, dtype: Any) -> jax.Array:
    """silu(gate) * up of float32 [R, 2 F], as `dtype` [R, F]."""
    gate, up = jnp.split(hidden, 2, axis=1)
    return (jax.nn.silu(gate) * up).astype(dtype)
