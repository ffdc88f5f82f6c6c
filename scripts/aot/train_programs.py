"""The programs of a training step that `train` compiles: those that the loop runs, lowered with shapes alone.

A recipe makes its objective of a model whose parameters exist in shape only, so what is trained, in which types, and
how it is laid over a mesh is what a run would have. A step is two programs: `add` for each of its batches, `update`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from omni_jax.omni import Omni
from omni_jax.train.batch import TextBatch
from omni_jax.train.drafters.batch import DraftBatch
from omni_jax.train.drafters.recipes import DFlash
from omni_jax.train.dry_run import bytes_held
from omni_jax.train.lora.recipe import Lora
from omni_jax.train.objective import Objective
from omni_jax.train.optimizer import optimizer_of, schedule_of
from omni_jax.train.settings import Compute, Run
from omni_jax.train.sft import Sft
from omni_jax.train.state import described, leaf_shardings, on_devices, shardings_of
from omni_jax.train.step import programs
from omni_jax.weights.trees import flatten, nest
from scripts.aot.programs import Program, Target
from scripts.small.configs import PUBLIC_DFLASH

AnyRecipe = Sft | Lora | DFlash
RECIPES: dict[str, type[AnyRecipe]] = {"sft": Sft, "lora": Lora, "dflash": DFlash}
Part = Literal["add", "update"]
# The programs of a step, and whether experts run in them.
PARTS: tuple[tuple[Part, bool], ...] = (("add", True), ("update", False))
# Of the schedule; no program depends on how many there are.
STEPS = 1000


def train_programs(target: Target, names: Sequence[str], rows: int, tokens: int) -> Iterator[Program]:
    """The two programs of each recipe for batches of `rows` rows of `tokens` tokens, on all devices together."""
    for name in names:
        for part, routed in PARTS:
            lower = partial(lower_step, target, recipe_of(target, name), rows, tokens, part)
            yield Program(f"{name} {part}", "thinker", routed, None, lower, rows * tokens)


def recipe_of(target: Target, name: str) -> AnyRecipe:
    """A recipe with its defaults, computed in the type of the target; nothing is read from its paths."""
    run = Run(model=Path(name), data=(Path(name),), output=Path(name))
    return RECIPES[name](run=run, compute=Compute(dtype=target.dtype.name))


def lower_step(target: Target, recipe: AnyRecipe, rows: int, tokens: int, part: Part) -> Any:
    """A program of a step, for a batch [rows, tokens]."""
    objective = objective_of(target, recipe)
    optimizer = optimizer_of(recipe.optimizer, STEPS, objective.axes)
    where, state = (make(objective, optimizer, target.mesh) for make in (shardings_of, described))
    made: Any = programs(objective, optimizer, schedule_of(recipe.optimizer, STEPS), where, target.mesh)
    batch = batch_of(target, recipe, rows, tokens)
    sums = made.described(batch)
    if part == "update":
        return made.update.lower(state, sums)
    return made.add.lower(state.params, objective.frozen, batch, sums)


def objective_of(target: Target, recipe: AnyRecipe) -> Objective:
    """What a recipe trains of the target's Thinker, with arrays that exist in shape only, where a run has them."""
    mesh, declaration = target.mesh, target.declarations["thinker"]
    mask = PUBLIC_DFLASH["dflash_config"]["mask_token_id"] % target.config.thinker.text.vocab_size
    processor: Any = SimpleNamespace(tokenizer=SimpleNamespace(token_id=lambda _: mask))
    made = []

    def arrays(params: dict) -> tuple[Any, Any]:
        omni = Omni({"thinker": params}, target.config, processor, mesh if mesh.size > 1 else None)
        made.append(recipe.objective(omni))
        return made[0].params, made[0].frozen

    params, frozen = jax.eval_shape(arrays, target.params("thinker"))
    names, axes = flatten(frozen), flatten(declaration.axes)
    frozen_axes = nest({path: axes[path] for path in names})
    return replace(
        made[0],
        params=on_devices(params, leaf_shardings(params, made[0].axes, mesh)),
        frozen=on_devices(frozen, leaf_shardings(frozen, frozen_axes, mesh)),
    )


def batch_of(target: Target, recipe: AnyRecipe, rows: int, tokens: int) -> Any:
    """Rows of text, several samples in each, laid over the mesh as `place_rows` does it."""
    ids = target.rows(rows, tokens)
    text = TextBatch(ids, ids, target.rows(3, rows, tokens, dtype=jnp.float32), ids)
    return DraftBatch(text, target.array(dtype=jnp.uint32)) if isinstance(recipe, DFlash) else text


def held(target: Target, name: str) -> dict[str, int]:
    """Bytes that one device holds throughout a run, by what they are."""
    recipe = recipe_of(target, name)
    objective = objective_of(target, recipe)
    state = described(objective, optimizer_of(recipe.optimizer, STEPS, objective.axes), target.mesh)
    return {
        "trained": bytes_held(state.params),
        "moments": bytes_held(state.optimizer),
        "gradients": bytes_held(state.params),
        "frozen": bytes_held(objective.frozen),
    }
