"""Routed experts on several devices: each computes the (row, expert) pairs whose experts it holds, and nothing else.

Rows [R, D] are split over some mesh axes (`split`). Expert weights are split over "expert" by expert and over "tensor"
by F: each device holds its slice of its experts, and a sum over both axes completes a row. Two ways bring rows and
experts together; both drop no row and have static shapes:

`replicated`: every expert shard sees all rows of its group, computes its own part, and the results are summed.
`exchanged`: a row travels by all-to-all, once to each shard that holds any of its experts, and back.

A batch that the mesh does not divide is whole on every shard, so there is nothing to exchange. Where rows are split
over e expert shards, `replicated` moves e - 1 copies of each row in both directions. `exchanged` moves one copy for
each shard that holds experts of the row; with A experts per row that is at most A copies. It therefore saves traffic
only where there are more shards than experts per row (e > A), and it needs more collectives.

Sums are float32 and rounded once, as on one device. The mesh is given explicitly; inside, each device works on its own
shards with the backends of `ops.moe`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from omni_jax.ops.int8 import Int8
from omni_jax.ops.low_rank import Factors, GatedFactors
from omni_jax.ops.moe import ExpertWeights, Routing, moe, partial_moe, route
from omni_jax.sharding import constrain, platform

# Rows of a shard above which they are exchanged. With fewer rows the time to start a collective counts most (10 to 20
# us, in which a link moves a megabyte or two: some hundred rows of the public width), so fewer collectives are faster.
EXCHANGE_ROWS = 256

Split = tuple[str, ...]


def sharded_moe(x: jax.Array, routing: Routing, experts: ExpertWeights, mesh: Mesh | None, split: Split) -> jax.Array:
    """As `ops.moe.moe`, with rows x [R, D] split over the axes `split` of `mesh` and expert weights as described."""
    if mesh is None or mesh.size == 1:
        return moe(x, routing, experts)
    shards = mesh.shape["expert"]
    rows = x.shape[0] // prod(mesh.shape[axis] for axis in split)
    exchange = "expert" in split and routing.ids.shape[1] < shards and rows > EXCHANGE_ROWS
    return (exchanged if exchange else replicated)(x, routing, experts, mesh, split)


def sharded_route(
    x: jax.Array, router: jax.Array, experts_per_token: int, normalise: bool, mesh: Mesh | None, split: Split
) -> Routing:
    """As `ops.moe.route`, each device for its own rows x [R, D]; the compiler would gather all rows to sort them."""
    choose = partial(route, experts_per_token=experts_per_token, normalise=normalise)
    if mesh is None or mesh.size == 1:
        return choose(x, router)
    rows = P(split or None)
    return jax.shard_map(choose, mesh=mesh, in_specs=(rows, P()), out_specs=rows, check_vma=False)(x, router)


def replicated(x: jax.Array, routing: Routing, experts: ExpertWeights, mesh: Mesh, split: Split) -> jax.Array:
    """As `sharded_moe`: every expert shard takes all rows [R, D] of its group, gathered if split; sums are reduced."""
    E, gather = experts.held, "expert" in split

    def local(x: jax.Array, routing: Routing, experts: ExpertWeights) -> jax.Array:
        if gather:
            x, routing = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", tiled=True), (x, routing))
        ids = own_ids(routing.ids, jax.lax.axis_index("expert"), experts.held)
        y = partial_moe(x, Routing(ids, routing.weights), experts, E)
        if not gather:
            return jax.lax.psum(y, ("expert", "tensor")).astype(x.dtype)
        return jax.lax.psum(jax.lax.psum_scatter(y, "expert", tiled=True), "tensor").astype(x.dtype)

    return _on_devices(local, x, routing, experts, mesh, split)


def exchanged(x: jax.Array, routing: Routing, experts: ExpertWeights, mesh: Mesh, split: Split) -> jax.Array:
    """As `sharded_moe`: rows [R, D], split over "expert" too, travel to the shards of their experts and back."""
    E, shards = experts.held, mesh.shape["expert"]

    def local(x: jax.Array, routing: Routing, experts: ExpertWeights) -> jax.Array:
        r, D = x.shape
        ids, weights, held = routing.ids, routing.weights, experts.held
        order, place, needed = _departures(ids // held, shards)
        # What is no row, or has no expert where it goes, is marked as elsewhere.
        theirs = own_ids(ids[order], jnp.arange(shards)[:, None, None], held)
        sent = jnp.sum(needed, axis=1, dtype=jnp.int32)
        theirs = jnp.where((jnp.arange(r) < sent[:, None])[..., None], theirs, held)
        swap = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)
        received = swap(sent)
        rows = _travel(x[order], sent, received)
        rows, theirs, weights = (a.reshape(shards * r, -1) for a in (rows, swap(theirs), swap(weights[order])))
        y = partial_moe(rows, Routing(theirs, weights), experts, E).reshape(shards, r, D)
        back = _travel(y, received, sent)
        back = jnp.take_along_axis(back, place[..., None], axis=1)
        y = jnp.sum(jnp.where(needed[..., None], back, 0), axis=0)
        return jax.lax.psum(y, "tensor").astype(x.dtype)

    return _on_devices(local, x, routing, experts, mesh, split)


def own_ids(ids: jax.Array, shard: Any, held: int) -> jax.Array:
    """Expert ids int32 [...] as numbers of `shard`, which holds `held` experts: 0 to held - 1; `held` for others."""
    own = ids - shard * held
    return jnp.where((own >= 0) & (own < held), own, held)


def _departures(shard: jax.Array, shards: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows go where, of rows whose experts lie on `shard` int32 [r, A]; all results are [shards, r].

    order: the rows in the order in which they leave for each shard, then those that do not leave. place: the position
    of each row in that order, for those that leave. needed: whether each row leaves for each shard.
    """
    needed = jnp.any(shard[None] == jnp.arange(shards)[:, None, None], axis=2)
    place = jnp.maximum(jnp.cumsum(needed, axis=1) - 1, 0)
    return jnp.argsort(~needed, axis=1, stable=True), place, needed


def _travel(blocks: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Blocks [shards, r, D], one for each shard, to the blocks [shards, r, D] that each shard sent here.

    sent, received: int32 [shards], the rows of each block that count. Only those move where the platform can do that;
    the rows after them are zero or what was there.
    """
    if platform() == "cpu":
        # XLA on CPU has no ragged form.
        return jax.lax.all_to_all(blocks, "expert", split_axis=0, concat_axis=0)
    shards, r, D = blocks.shape
    flat = blocks.reshape(shards * r, D)
    start = jnp.arange(shards, dtype=jnp.int32) * r
    # Each shard has a block for every other, so where a row lands is known without asking.
    landing = jnp.full((shards,), jax.lax.axis_index("expert") * r, jnp.int32)
    moved = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), start, sent, landing, received, axis_name="expert")
    return moved.reshape(shards, r, D)


def _on_devices(
    local: Callable[[jax.Array, Routing, ExpertWeights], jax.Array],
    x: jax.Array,
    routing: Routing,
    experts: ExpertWeights,
    mesh: Mesh,
    split: Split,
) -> jax.Array:
    """`local` on every device of the mesh with its shards of rows x [R, D], of their routing and of the experts."""
    l = jnp.asarray(experts.layer, jnp.int32)
    if mesh.shape["fsdp"] > 1:
        # Their width is split in storage; what is gathered for the product should be one layer, not the stack. The
        # layer is split as the stack is, or the compiler would gather the stack to take a whole layer out of it.
        experts = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, l), replace(experts, layer=None))
        experts = jax.tree.map(lambda w, axes: constrain(w, axes, mesh), experts, stored_axes(experts))
        l = jnp.int32(0)
    rows: Any = P(split or None)
    run = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, _specs(experts)), out_specs=rows, check_vma=False)
    return run(x, routing, replace(experts, layer=l))


def _specs(experts: ExpertWeights) -> ExpertWeights:
    """How weights and their updates are split: by expert, and by F over "tensor"."""
    all_devices: Any = P()
    by_expert: Any = P(None, "expert")
    over_in: Any = P(None, "expert", None, "tensor")
    over_out: Any = P(None, "expert", "tensor")
    over_gate_up: Any = P(None, "expert", None, None, "tensor")
    gate_up, down = over_gate_up, over_out
    if isinstance(experts.gate_up, Int8):
        # As on disk: [2, F, D] and [D, F], and a scale for each output.
        gate_up: Any = Int8(over_in, over_in)
        down: Any = Int8(over_in, by_expert)
    lora = None
    if experts.lora is not None:
        inward = Factors(by_expert, over_out, experts.lora.gate.scale)
        lora = GatedFactors(inward, inward, Factors(over_in, by_expert, experts.lora.down.scale))
    return ExpertWeights(gate_up, down, all_devices, lora)


def stored_axes(experts: ExpertWeights) -> ExpertWeights:
    """The logical axes of weights and of their updates, as they are declared."""

    def axes(*own: str | None) -> Any:
        return "layers", "expert", *own

    lora = None
    if experts.lora is not None:
        inward = Factors(axes(None, "embed"), axes("mlp", None), experts.lora.gate.scale)
        outward = Factors(axes(None, "mlp"), axes("embed", None), experts.lora.down.scale)
        lora = GatedFactors(inward, inward, outward)
    layer: Any = None
    if isinstance(experts.gate_up, Int8):
        gate_up: Any = Int8(axes(None, "mlp", "embed"), axes(None, "mlp"))
        return ExpertWeights(gate_up, Int8(axes("embed", "mlp"), axes("embed")), layer, lora)
    return ExpertWeights(axes("embed", None, "mlp"), axes("mlp", "embed"), layer, lora)
