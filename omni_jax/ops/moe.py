"""Routed experts with one signature: each row passes through its few chosen experts and nothing else is computed.

    rows [R, D] -> route -> Routing (ids and weights [R, A]) -> moe, over the ExpertWeights of all layers -> rows [R, D]

Experts may have low-rank updates (`ops.low_rank`), which every way computes beside their weights, and may be `Int8`,
which only forward passes take.

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

from omni_jax.ops.int8 import Int8, Weight, joined, product, summed
from omni_jax.ops.kept import keep
from omni_jax.ops.low_rank import Factors, GatedFactors
from omni_jax.sharding import is_hopper, platform

# Rows up to which looping over (row, expert) pairs is faster on CPU, and gathering the experts' weights on GPU.
PAIR_ROWS = 4
GPU_GATHER_ROWS = 3
COMPARED_PAIRS = 1024  # of a row and an expert: more are sorted, on GPU
# A tile has 1 to TILE_STEPS steps of rows, the number that its rows need, and a program for each number: more steps pad
# less and compile longer. A step's bounds: a product of fewer rows takes the same time, and one of over 512 rows leaves
# the CPU's caches.
TILE_STEPS = 8
STEP_ROWS = (8, 64)
# Widths that tokamax's Hopper kernels cut into whole tiles: of weights as wide as the rows, and of `Int8`.
GROUPED_MULTIPLE, INT8_MULTIPLE = 64, 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """The experts of each row: ids int32 [R, A], and what each of them counts, weights [R, A]."""

    ids: jax.Array
    weights: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """gate_up [L, E, D, 2, F] and down [L, E, F, D] of all layers, and the layer to take, int32 [].

    As `Int8`, they are [L, E, 2, F, D] and [L, E, D, F]. lora: low-rank updates, factors [L, E, ...]; None without.
    """

    gate_up: Weight
    down: Weight
    layer: jax.Array | int
    lora: GatedFactors | None = None

    @property
    def held(self) -> int:
        """E, the number of experts of a layer that are here."""
        return jax.tree.leaves(self.gate_up)[0].shape[1]

    def flat(self) -> tuple["Mlp", jax.Array | int]:
        """The experts of all layers along one axis: gate_up [L * E, D, 2 F] and down [L * E, F, D]; the first index."""
        every = Mlp(joined(self.gate_up), self.down, self.lora)
        return jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), every), self.layer * self.held


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mlp:
    """One expert: gate_up [D, 2 F], down [F, D], and their updates; or several, along a leading axis."""

    gate_up: Weight
    down: Weight
    lora: GatedFactors | None


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
    E = experts.held
    flat, first = experts.flat()

    def pair(y: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        row, choice = i // A, i % A

        def add(y: jax.Array) -> jax.Array:
            out = _mlp(jax.lax.dynamic_slice_in_dim(x, row, 1), _one(flat, first + ids[row, choice]))
            return y.at[row].add(out[0] * weights[row, choice])

        # Where all experts are here, no condition is needed.
        return add(y) if total is None else jax.lax.cond(ids[row, choice] < E, add, lambda y: y, y), None

    return jax.lax.scan(pair, jnp.zeros(x.shape, jnp.float32), jnp.arange(R * A))[0]


def tiled(x: jax.Array, routing: Routing, experts: ExpertWeights, total: int | None = None) -> jax.Array:
    """[R, D] -> float32 [R, D], rows sorted by expert and cut into tiles of one expert each: many rows, any platform.

    Pairs of experts elsewhere are sorted after all others and are in no tile.
    """
    ids, (R, A) = routing.ids, routing.ids.shape
    E = experts.held
    sizes = _tile_sizes(R, R * A // (total or E))
    order, start, rows, expert = _tile_plan(ids, E, sizes[-1])
    flat, first = experts.flat()
    # The last tile may reach beyond the last pair.
    source = jnp.pad(order // A, (0, sizes[-1]))
    out: Any = _tile_products(x[source], flat, (start, rows, first + expert), sizes)
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


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tile_products(x: jax.Array, experts: Mlp, tiles: Tiles, sizes: tuple[int, ...]) -> jax.Array:
    """Each tile's rows of x [pairs + largest tile, D] through its expert, float32.

    A tile rounded up to its size also fills rows of the tiles after it, which these then replace.
    """

    def one(out: jax.Array, start: jax.Array, rows: jax.Array, e: jax.Array, size: int) -> jax.Array:
        y = _mlp(jax.lax.dynamic_slice_in_dim(x, start, size), _one(experts, e))
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, 0)

    return _each_tile(one, jnp.zeros(x.shape, jnp.float32), tiles, sizes)


def _tile_products_forward(x: jax.Array, experts: Mlp, tiles: Tiles, sizes: tuple[int, ...]) -> tuple:
    """The products, and for the backward pass what each tile's first product gave, [pairs + largest tile, 2 F]."""
    if isinstance(experts.gate_up, Int8):
        raise TypeError("experts in eight bits have no gradient; take those that they were made of")

    def one(carry: tuple, start: jax.Array, rows: jax.Array, e: jax.Array, size: int) -> tuple:
        expert = _one(experts, e)
        hidden = _first(jax.lax.dynamic_slice_in_dim(x, start, size), expert)
        made = _second(_gated(hidden, x.dtype), expert), hidden.astype(x.dtype)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_rows, some, start, 0)
            for all_rows, some in zip(carry, made, strict=True)
        )

    empty = jnp.zeros(x.shape, jnp.float32), jnp.zeros((len(x), experts.gate_up.shape[2]), x.dtype)
    out, hidden = keep(_each_tile(one, empty, tiles, sizes))
    return out, (x, experts, tiles, hidden)


def _tile_products_backward(sizes: tuple[int, ...], saved: tuple, cotangent: jax.Array) -> tuple:
    """Cotangents of x and of the experts: each tile's are added to its expert's in place.

    What nobody takes, such as cotangents of weights beside which only updates are trained, the compiler leaves out.
    """
    x, experts, tiles, hidden = saved
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(carry: tuple, start: jax.Array, rows: jax.Array, e: jax.Array, size: int) -> tuple:
        dx, d_experts = carry
        x_rows, h, dy = (jax.lax.dynamic_slice_in_dim(a, start, size) for a in (x, hidden, cotangent))
        dy = jnp.where(jnp.arange(size)[:, None] < rows, dy, 0.0).astype(x.dtype)
        expert = _one(experts, e)
        inner, pull = jax.vjp(partial(_gated, dtype=x.dtype), h.astype(jnp.float32))
        d_inner = product("RD,FD->RF", dy, expert.down)
        d_second, d_inner = _with_updates(GatedFactors.second, expert.lora, inner, dy, d_inner)
        (dh,) = pull(d_inner.astype(x.dtype))
        dh = dh.astype(x.dtype)
        d_first, d_rows = _with_updates(
            GatedFactors.first, expert.lora, x_rows, dh, product("RF,DF->RD", dh, expert.gate_up)
        )
        d_lora = jax.tree.map(jnp.add, d_first, d_second)
        d_one = Mlp(product("RD,RF->DF", x_rows, dh), product("RF,RD->FD", inner, dy), d_lora)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, d_rows.astype(x.dtype), start, 0)
        return dx, jax.tree.map(lambda whole, d: whole.at[e].add(d.astype(x.dtype)), d_experts, d_one)

    return *_each_tile(one, jax.tree.map(jnp.zeros_like, (x, experts)), tiles, sizes), None


def _with_updates(
    update: Callable[[GatedFactors, jax.Array], jax.Array],
    lora: GatedFactors | None,
    rows: jax.Array,
    cotangent: jax.Array,
    d_rows: jax.Array,
) -> tuple[GatedFactors | None, jax.Array]:
    """The cotangents of the factors of an update of rows [R, in], and d_rows [R, in] with those that it gives them."""
    if lora is None:
        return None, d_rows
    d_lora, more = jax.vjp(update, lora, rows)[1](cotangent.astype(jnp.float32))
    return d_lora, d_rows + more


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
    E = experts.held
    flat, first = experts.flat()
    if total is not None:
        weights, ids = jnp.where(ids < E, weights, 0), jnp.where(ids < E, ids, jnp.min(ids) % E)
    chosen = jax.tree.map(lambda w: w[first + ids], flat)
    hidden = summed(x[:, None], chosen.gate_up)
    hidden = hidden if chosen.lora is None else hidden + chosen.lora.first(x[:, None])
    hidden = _gated(hidden, x.dtype)
    out = summed(hidden, chosen.down)
    out = out if chosen.lora is None else out + chosen.lora.second(hidden)
    return jnp.sum(out * weights[..., None].astype(jnp.float32), axis=1)


def grouped(x: jax.Array, routing: Routing, experts: ExpertWeights, total: int | None = None) -> jax.Array:
    """[R, D] -> float32 [R, D] by grouped products over sorted rows: many rows on GPU. `tiled` without a kernel."""
    if find_spec("tokamax") is None or not _fits_kernel(x, experts):
        return tiled(x, routing, experts, total)
    import tokamax  # pyright: ignore[reportMissingImports]

    ids, E = routing.ids, experts.held
    order, place = _order_by_expert(ids)
    # A scatter would be three kernels.
    counts = jnp.sum(ids.reshape(-1, 1) == jnp.arange(E), axis=0, dtype=jnp.int32)
    dot = partial(tokamax.ragged_dot, group_sizes=counts, implementation="mosaic", preferred_element_type=x.dtype)

    def update(factors: Factors, rows: jax.Array) -> jax.Array:
        # The kernel wants whole tiles of the rank too.
        a, b = (_padded(w[experts.layer], axis) for w, axis in ((factors.a, 1), (factors.b, 2)))
        return (factors.scale * dot(dot(rows, a.swapaxes(1, 2)), b.swapaxes(1, 2))).astype(x.dtype)

    rows = x[order // ids.shape[1]]
    hidden = keep(dot(rows, _of_layer(joined(experts.gate_up), experts.layer)))
    hidden = hidden if experts.lora is None else hidden + experts.lora.first(rows, update)
    hidden = _gated(hidden, x.dtype)
    out = keep(dot(hidden, _of_layer(experts.down, experts.layer)))
    out = out if experts.lora is None else out + experts.lora.second(hidden, update)
    # Gathered back by their places: scattering would fill an array and write another.
    rows = _here(out[place], ids, E, total).astype(jnp.float32)
    return jnp.sum(rows * routing.weights[..., None].astype(jnp.float32), axis=1)


def _order_by_expert(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order of pairs ids [R, A] by expert, int32 [R * A], and the place of each pair in it, [R, A].

    Few are compared each with each: two kernels, where sorting them and inverting the order are five.
    """
    flat, pair = ids.reshape(-1), jnp.arange(ids.size, dtype=jnp.int32)
    if ids.size > COMPARED_PAIRS:
        order = jnp.argsort(flat, stable=True)
        place = jnp.zeros_like(pair).at[order].set(pair)
    else:
        key = flat * ids.size + pair
        place = jnp.sum(key < key[:, None], axis=1, dtype=jnp.int32)
        order = jnp.sum(jnp.where(place[:, None] == pair, pair[:, None], 0), axis=0, dtype=jnp.int32)
    return order, place.reshape(ids.shape)


def _fits_kernel(x: jax.Array, experts: ExpertWeights) -> bool:
    """Whether tokamax's Hopper kernels take rows x [R, D] and these experts."""
    if isinstance(experts.down, Int8):
        fits, multiple = True, INT8_MULTIPLE
        D, F = experts.down.values.shape[2:]
    else:
        fits, multiple = x.dtype == experts.down.dtype, GROUPED_MULTIPLE
        F, D = experts.down.shape[2:]
    return is_hopper() and fits and x.dtype in (jnp.bfloat16, jnp.float16) and not D % multiple and not F % multiple


def _of_layer(weight: Weight, l: Any) -> Any:
    """The experts of layer `l` [E, in, out], as tokamax takes them."""
    if not isinstance(weight, Int8):
        return weight[l]
    import qwix  # pyright: ignore[reportMissingImports]

    values, scale = weight.values[l], weight.scale[l]
    return qwix.QArray(values.swapaxes(1, 2), scale[:, None], qtype=values.dtype)


def _padded(w: jax.Array, axis: int) -> jax.Array:
    """`w` with zeros after its values along `axis`, up to a multiple of GROUPED_MULTIPLE."""
    return jnp.pad(w, [(0, -n % GROUPED_MULTIPLE if i == axis else 0) for i, n in enumerate(w.shape)])


def _one(experts: Mlp, e: Any) -> Mlp:
    """Expert number `e`, int32 [], of several."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, e, keepdims=False), experts)


def _mlp(rows: jax.Array, expert: Mlp) -> jax.Array:
    """One expert's MLP on rows [R, D], float32 out."""
    return _second(_gated(_first(rows, expert), rows.dtype), expert)


def _first(rows: jax.Array, expert: Mlp) -> jax.Array:
    """Gate and up of rows [R, D], float32 [R, 2 F]."""
    hidden = product(rows, expert.gate_up)
    return hidden if expert.lora is None else hidden + expert.lora.first(rows)


def _second(inner: jax.Array, expert: Mlp) -> jax.Array:
    """Down of rows [R, F], float32 [R, D]."""
    out = product(inner, expert.down)
    return out if expert.lora is None else out + expert.lora.second(inner)


def _gated(hidden: jax.Array, dtype: Any) -> jax.Array:
    """silu(gate) * up of float32 [..., 2 F], as `dtype` [..., F]."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)
