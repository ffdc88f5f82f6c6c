"""What a run would do, without doing it: parameters, memory on each device, steps, and one batch as text.

The program of a step is compiled, which says what memory it works in; nothing runs.
"""

from math import prod
from typing import Any

import jax
from jax.sharding import Mesh

from omni_jax.sharding import mesh_name, place_rows
from omni_jax.train.objective import Batches, Objective, Step
from omni_jax.train.optimizer import optimizer_of, schedule_of
from omni_jax.train.settings import Recipe
from omni_jax.train.state import described, shardings_of
from omni_jax.train.step import programs

# Characters of a batch that are shown.
MAX_SHOWN = 8000


def dry_run(
    recipe: Recipe, objective: Objective, batches: Batches, steps: int, mesh: Mesh | None = None
) -> tuple[str, Step]:
    """The report of a run of `steps` steps as text, and its first batch; the data are at their beginning."""
    first = next(iter(batches))
    trained, frozen = counts(objective.params), counts(objective.frozen)
    lines = [
        f"parameters trained: {sum(trained.values()):,}",
        *(f"  {name} {count:,}" for name, count in trained.items()),
        f"parameters frozen: {sum(frozen.values()):,}",
        *(f"  {name} {count:,}" for name, count in frozen.items()),
        f"steps: {steps:,}, each of {recipe.optimizer.accumulation} batch(es)",
        f"memory on each device of {mesh_name(mesh or {})}, with the batch below:",
        *(f"  {name} {count / 1e9:.3f} GB" for name, count in memory(recipe, objective, first, steps, mesh).items()),
    ]
    return "\n".join(lines), first


def counts(arrays: Any) -> dict[str, int]:
    """Numbers in the arrays of a pytree, summed by the first two names of their paths."""
    found: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(arrays):
        name = jax.tree_util.keystr(path[:2], simple=True, separator="/")
        found[name] = found.get(name, 0) + prod(x.shape)
    return found


def memory(recipe: Recipe, objective: Objective, first: Step, steps: int, mesh: Mesh | None) -> dict[str, int]:
    """Bytes on one device by what they hold; those of a step are what the compiler plans for this batch."""
    optimizer = optimizer_of(recipe.optimizer, steps, objective.axes)
    state, where = described(objective, optimizer, mesh), shardings_of(objective, optimizer, mesh)
    made = programs(objective, optimizer, schedule_of(recipe.optimizer, steps), where, mesh)
    batch = place_rows(first.batch, mesh)
    compiled = made.add.lower(state.params, objective.frozen, batch, made.described(batch)).compile()
    planned = compiled.memory_analysis()
    parts = {
        "trained parameters": bytes_held(state.params),
        "state of the optimizer": bytes_held(state.optimizer),
        "gradients": bytes_held(state.params),
        "frozen parameters": bytes_held(objective.frozen),
        "work of a step": planned.temp_size_in_bytes if planned is not None else 0,
    }
    return {**parts, "all": sum(parts.values())}


def bytes_held(arrays: Any) -> int:
    """Bytes that one device holds of arrays with shardings."""
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
