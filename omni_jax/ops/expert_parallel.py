"""Routed experts that lie on several devices: each computes the pairs whose experts it holds, and nothing else.

Rows [R, D] lie split over some mesh axes (`split`); expert weights lie split over "expert" by expert and over "tensor"
by F, so each device holds its slice of its experts, and a sum over both axes completes a row. Two ways bring rows and
experts together, both dropless and with static shapes:

`replicated`: every expert shard sees all rows of its group, computes what is its own, and the results are summed.
`exchanged`: a row travels by all-to-all, once to each shard that holds any of its experts, and back.

Where all rows are on every shard anyway (a batch that the mesh does not divide) there is nothing to exchange. Where
they are split, gathering and reducing them moves (e - 1) copies of each row both ways, e being the number of expert
shards; exchanging moves as many as a row has shards with experts of its own, which is hardly fewer unless there are
more shards than experts per row, and costs more collectives.

Sums are float32 and rounded once, as on one device. The mesh is given explicitly; inside, each device works on its own
pieces with the backends of `ops.moe`.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from omni_jax.ops.moe import moe, partial_moe, route
from omni_jax.sharding import platform

# Rows of a shard above which they are exchanged: below, a collective takes its start-up time (10 to 20 us, in which a
# link moves a megabyte or two: some hundred rows of the public width), so fewer collectives win.
EXCHANGE_ROWS = 256

Split = tuple[str, ...]


def sharded_moe(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    l: Any,
    mesh: Mesh | None,
    split: Split,
) -> jax.Array:
    """As `ops.moe.moe`, with rows that lie split over the axes `split` of `mesh` and expert weights as described."""
    if mesh is None or mesh.size == 1:
        return moe(x, ids, weights, gate_up, down, l)
    shards = mesh.shape["expert"]
    rows = x.shape[0] // prod(mesh.shape[axis] for axis in split)
    exchange = "expert" in split and ids.shape[1] < shards and rows > EXCHANGE_ROWS
    return (exchanged if exchange else replicated)(x, ids, weights, gate_up, down, l, mesh, split)


def sharded_route(
    x: jax.Array, router: jax.Array, experts_per_token: int, normalise: bool, mesh: Mesh | None, split: Split
) -> tuple[jax.Array, jax.Array]:
    """As `ops.moe.route`, each device for its own rows; left alone, the compiler would gather them all to sort them."""
    choose = partial(route, experts_per_token=experts_per_token, normalise=normalise)
    if mesh is None or mesh.size == 1:
        return choose(x, router)
    rows = P(split or None)
    return jax.shard_map(choose, mesh=mesh, in_specs=(rows, P()), out_specs=(rows, rows), check_vma=False)(x, router)


def replicated(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    l: Any,
    mesh: Mesh,
    split: Split,
) -> jax.Array:
    """Every expert shard takes all rows of its group: gathered first if they are split, reduced afterwards."""
    E, gather = gate_up.shape[1], "expert" in split

    def local(x: Any, ids: Any, weights: Any, gate_up: Any, down: Any, l: Any) -> jax.Array:
        if gather:
            x, ids, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, ids, weights))
        ids = own_ids(ids, jax.lax.axis_index("expert"), gate_up.shape[1])
        y = partial_moe(x, ids, weights, gate_up, down, l, E)
        if not gather:
            return jax.lax.psum(y, ("expert", "tensor")).astype(x.dtype)
        return jax.lax.psum(jax.lax.psum_scatter(y, "expert", tiled=True), "tensor").astype(x.dtype)

    return _on_devices(local, x, ids, weights, gate_up, down, l, mesh, split)


def exchanged(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    l: Any,
    mesh: Mesh,
    split: Split,
) -> jax.Array:
    """Rows, which are split over "expert" too, travel to the shards of their experts and back."""
    E, shards = gate_up.shape[1], mesh.shape["expert"]

    def local(x: Any, ids: Any, weights: Any, gate_up: Any, down: Any, l: Any) -> jax.Array:
        r, D = x.shape
        held = gate_up.shape[1]
        order, place, needed = _departures(ids // held, shards)
        # What is no row, or of no interest where it goes, is marked as elsewhere.
        theirs = own_ids(ids[order], jnp.arange(shards)[:, None, None], held)
        sent = jnp.sum(needed, axis=1, dtype=jnp.int32)
        theirs = jnp.where((jnp.arange(r) < sent[:, None])[..., None], theirs, held)
        swap = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)
        received = swap(sent)
        rows = _travel(x[order], sent, received)
        rows, theirs, weights = (a.reshape(shards * r, -1) for a in (rows, swap(theirs), swap(weights[order])))
        y = partial_moe(rows, theirs, weights, gate_up, down, l, E).reshape(shards, r, D)
        back = _travel(y, received, sent)
        back = jnp.take_along_axis(back, place[..., None], axis=1)
        y = jnp.sum(jnp.where(needed[..., None], back, 0), axis=0)
        return jax.lax.psum(y, "tensor").astype(x.dtype)

    return _on_devices(local, x, ids, weights, gate_up, down, l, mesh, split)


def own_ids(ids: jax.Array, shard: Any, held: int) -> jax.Array:
    """Expert ids as those of `shard`, which holds `held` of them: 0 to held - 1, and `held` for experts elsewhere."""
    own = ids - shard * held
    return jnp.where((own >= 0) & (own < held), own, held)


def _departures(shard: jax.Array, shards: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows go where, of rows whose experts lie on `shard` int32 [r, A]; all results are [shards, r].

    order: the rows in the order in which they leave for each shard, those that need not behind those that do. place:
    the position of each row in that order, for those that leave. needed: whether each row leaves for each shard.
    """
    needed = jnp.any(shard[None] == jnp.arange(shards)[:, None, None], axis=2)
    place = jnp.maximum(jnp.cumsum(needed, axis=1) - 1, 0)
    return jnp.argsort(~needed, axis=1, stable=True), place, needed


def _travel(blocks: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Blocks [shards, r, D], one for each shard, to the blocks that each shard sent here.

    sent, received: int32 [shards], the rows of each block that count. Only those move where the platform can do that;
    what stands behind them is zero or what was there.
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
    local: Callable[..., jax.Array],
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    l: Any,
    mesh: Mesh,
    split: Split,
) -> jax.Array:
    """`local` on every device of the mesh with its pieces."""
    if mesh.shape["fsdp"] > 1:
        # Their width is split in storage; what is gathered for the product should be one layer, not the stack.
        gate_up, down = (jax.lax.dynamic_index_in_dim(w, l) for w in (gate_up, down))
        l = 0
    rows = P(split or None)
    into = (rows, rows, rows, P(None, "expert", None, None, "tensor"), P(None, "expert", "tensor"), P())
    run = jax.shard_map(local, mesh=mesh, in_specs=into, out_specs=rows, check_vma=False)
    return run(x, ids, weights, gate_up, down, jnp.asarray(l, jnp.int32))
