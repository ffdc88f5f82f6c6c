"""Routed experts behind one signature: each row passes through its few chosen experts and nothing else is computed.

Weights stay stacked over layers, gate_up [L, E, D, 2, F] and down [L, E, F, D], and are indexed by layer and expert
together: slicing out one layer first would copy all of its experts at every step on CPU.

Which way is fastest depends on the rows and the platform: a few rows loop over (row, expert) pairs on CPU and fuse a
gather, a product and a sum on GPU; many rows are sorted by expert and cut into tiles of one expert each on CPU, and go
through a grouped matrix product (tokamax) on GPU. `jax.lax.ragged_dot` is not used: on CPU it computes every expert for
every row.

Source: transformers `Qwen3OmniMoeThinkerTextSparseMoeBlock`.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.sharding import platform

# Rows up to which looping over (row, expert) pairs wins on CPU, and gathering the experts' weights on GPU.
PAIR_ROWS = 8
TILE_ROWS = (8, 128)
GPU_GATHER_ROWS = 3
# Widths that tokamax's Hopper kernel cuts into whole tiles.
GROUPED_MULTIPLE = 64


def route(x: jax.Array, router: jax.Array, experts_per_token: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Choose experts for rows x [R, D] by router [E, D]: ids int32 [R, A] and weights [R, A] in x's dtype."""
    logits = jnp.einsum("RD,ED->RE", x, router, preferred_element_type=jnp.float32).astype(x.dtype)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, ids = jax.lax.top_k(probabilities, experts_per_token)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return ids, weights.astype(x.dtype)


def moe(x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, l: Any) -> jax.Array:
    """Weighted sum over each row's experts of down(silu(gate(x)) * up(x)).

    x [R, D], ids int32 [R, A], weights [R, A], gate_up [L, E, D, 2, F], down [L, E, F, D], layer `l`; returns [R, D].
    """
    if platform() == "cpu":
        backend = pairwise if x.shape[0] <= PAIR_ROWS else tiled
    else:
        backend = gathered if x.shape[0] <= GPU_GATHER_ROWS else grouped
    return backend(x, ids, weights, gate_up, down, l)


def pairwise(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, l: Any
) -> jax.Array:
    """One (row, expert) pair after the other: reads just the chosen experts, for a few rows on CPU."""
    R, A = ids.shape
    gate_up, down, first = _flat(gate_up, down, l)

    def pair(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        row, choice = i // A, i % A
        out = _expert(jax.lax.dynamic_slice_in_dim(x, row, 1), gate_up, down, first + ids[row, choice])
        return y.at[row].add(out[0] * weights[row, choice]), None

    return jax.lax.scan(pair, jnp.zeros(x.shape, jnp.float32), jnp.arange(R * A))[0].astype(x.dtype)


def tiled(x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, l: Any) -> jax.Array:
    """Rows sorted by expert and cut into tiles that belong to one expert each: many rows, any platform."""
    R, A = ids.shape
    E = gate_up.shape[1]
    # Tiles of about half an expert's share of the rows: tall products, with little padding.
    tile = min(max(1 << (R * A // E // 4).bit_length(), TILE_ROWS[0]), TILE_ROWS[1])
    tiles = -(-R * A // tile) + E
    slot, source, tile_expert, used = _tile_plan(ids, E, tile, tiles)
    gate_up, down, first = _flat(gate_up, down, l)

    def one(out: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        def compute(out: jax.Array) -> jax.Array:
            rows = x[jax.lax.dynamic_slice_in_dim(source, t * tile, tile)]
            y = _expert(rows, gate_up, down, first + tile_expert[t])
            return jax.lax.dynamic_update_slice_in_dim(out, y, t * tile, 0)

        return jax.lax.cond(t < used, compute, lambda out: out, out), None

    out, _ = jax.lax.scan(one, jnp.zeros((tiles * tile, x.shape[1]), jnp.float32), jnp.arange(tiles))
    return jnp.einsum("RAD,RA->RD", out[slot], weights.astype(jnp.float32)).astype(x.dtype)


def _tile_plan(ids: jax.Array, E: int, tile: int, tiles: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """For pairs ids [R, A]: slot of each pair [R, A], row in each slot, expert of each tile, and tiles in use.

    Slots that no pair fills hold some row whose result is never read. Nothing is scattered: that is slow on CPU.
    """
    R, A = ids.shape
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.sum(flat[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    first_pair = jnp.cumsum(counts) - counts
    tiles_per_expert = -(-counts // tile)
    last_tile = jnp.cumsum(tiles_per_expert)
    first_slot = (last_tile - tiles_per_expert) * tile
    slot = first_slot[flat] + jnp.argsort(order) - first_pair[flat]
    tile_expert = jnp.minimum(jnp.sum(jnp.arange(tiles)[:, None] >= last_tile, axis=1), E - 1)
    expert = jnp.repeat(tile_expert, tile, total_repeat_length=tiles * tile)
    pair = first_pair[expert] + jnp.arange(tiles * tile) - first_slot[expert]
    source = order[jnp.clip(pair, 0, R * A - 1)] // A
    return slot.reshape(R, A), source, tile_expert, last_tile[-1]


def gathered(
    x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, l: Any
) -> jax.Array:
    """Gather, multiply and sum as one fusion with no temporary: one to three rows on GPU."""
    F = down.shape[2]
    flat_gate_up, flat_down, first = _flat(gate_up, down, l)
    rows = first + ids
    hidden = jnp.sum(x[:, None, :, None].astype(jnp.float32) * flat_gate_up[rows].astype(jnp.float32), axis=2)
    hidden = (jax.nn.silu(hidden[..., :F]) * hidden[..., F:]).astype(x.dtype)
    out = jnp.sum(hidden[..., None].astype(jnp.float32) * flat_down[rows].astype(jnp.float32), axis=2)
    return jnp.sum(out * weights[..., None].astype(jnp.float32), axis=1).astype(x.dtype)


def grouped(x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: jax.Array, down: jax.Array, l: Any) -> jax.Array:
    """Grouped matrix products over rows sorted by expert: many rows on GPU; tiles where tokamax has no kernel."""
    R, A = ids.shape
    _, E, D, _, F = gate_up.shape
    half = x.dtype in (jnp.bfloat16, jnp.float16) and x.dtype == gate_up.dtype
    if find_spec("tokamax") is None or not half or D % GROUPED_MULTIPLE or F % GROUPED_MULTIPLE:
        return tiled(x, ids, weights, gate_up, down, l)
    import tokamax  # pyright: ignore[reportMissingImports]

    order = jnp.argsort(ids.reshape(-1), stable=True)
    counts = jnp.zeros(E, jnp.int32).at[ids.reshape(-1)].add(1)
    dot = partial(tokamax.ragged_dot, group_sizes=counts, implementation="mosaic", preferred_element_type=x.dtype)
    hidden = dot(x[order // A], gate_up[l].reshape(E, D, 2 * F))
    hidden = jax.nn.silu(hidden[:, :F]) * hidden[:, F:]
    out = dot(hidden, down[l])
    # Gathered back by its inverse, the order costs no array of its own: scattering would fill one and write another.
    place = jnp.zeros(R * A, jnp.int32).at[order].set(jnp.arange(R * A, dtype=jnp.int32)).reshape(R, A)
    return jnp.sum(out[place].astype(jnp.float32) * weights[..., None].astype(jnp.float32), axis=1).astype(x.dtype)


def _flat(gate_up: jax.Array, down: jax.Array, l: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Weights with layer and expert as one axis, [L * E, D, 2 F] and [L * E, F, D], and the layer's first index."""
    L, E, D, _, F = gate_up.shape
    return gate_up.reshape(L * E, D, 2 * F), down.reshape(L * E, F, D), l * E


def _expert(rows: jax.Array, gate_up: jax.Array, down: jax.Array, e: Any) -> jax.Array:
    """One expert's MLP on rows [R, D], float32 out."""
    F = down.shape[1]
    w_in = jax.lax.dynamic_index_in_dim(gate_up, e, keepdims=False)
    w_out = jax.lax.dynamic_index_in_dim(down, e, keepdims=False)
    hidden = jnp.dot(rows, w_in, preferred_element_type=jnp.float32)
    hidden = (jax.nn.silu(hidden[:, :F]) * hidden[:, F:]).astype(rows.dtype)
    return jnp.dot(hidden, w_out, preferred_element_type=jnp.float32)
