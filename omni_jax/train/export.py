"""What users load, from any checkpoint of a run: of the best step, or of the last one before a run could not go on.

config.toml -> recipe -> objective; checkpoints/<step> -> its parameters -> what the recipe writes
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
from jax.sharding import Mesh
from tyro.conf import OmitArgPrefixes, Positional

from omni_jax.distributed import Machines
from omni_jax.errors import InputError
from omni_jax.train.checkpoints import open_checkpoints
from omni_jax.train.loop import claimed
from omni_jax.train.objective import Objective
from omni_jax.train.settings import Recipe
from omni_jax.train.state import leaf_shardings, on_devices


@dataclass(frozen=True)
class Export:
    """Write what users load from a checkpoint of a run, by default of the one with the lowest loss."""

    run: Positional[Path]
    """The run's directory."""
    output: Positional[Path]
    """Directory that is made for the result."""
    step: int | None = None
    """Step of the checkpoint; a run keeps the latest ones and the best."""
    devices: OmitArgPrefixes[Machines] = field(default_factory=Machines)


def placed(recipe: Recipe, asked: Export) -> Recipe:
    """The recipe of a run in the directory and on the devices that are asked for; without a mesh, on the run's own."""
    mesh = asked.devices.mesh or recipe.compute.mesh
    run, compute = replace(recipe.run, output=asked.run), replace(recipe.compute, mesh=mesh)
    return replace(recipe, run=run, compute=compute)


def chosen_step(recipe: Recipe, asked: Export) -> int:
    """The step of the checkpoint that is asked for; InputError if there is none, or the destination exists."""
    if asked.output.exists():
        raise InputError(f"{asked.output} exists; name a new directory")
    with claimed(recipe), open_checkpoints(recipe.run.output, recipe.run.keep) as checkpoints:
        step = checkpoints.best if asked.step is None else asked.step
        if step not in checkpoints.steps:
            held = ", ".join(map(str, checkpoints.steps)) or "none yet"
            raise InputError(f"{checkpoints.directory} has no checkpoint of step {step}; there are: {held}")
        return step


def export(recipe: Recipe, step: int, objective: Objective, mesh: Mesh | None, output: Path) -> None:
    """Write a checkpoint of the run in `recipe.run.output` as its objective does, into a new directory.

    InputError for a run that is under way, CheckpointError for what cannot be read or written.
    """
    with claimed(recipe), open_checkpoints(recipe.run.output, recipe.run.keep) as checkpoints:
        wanted = on_devices(objective.params, leaf_shardings(objective.params, objective.axes, mesh))
        for array in jax.tree.leaves(objective.params):
            array.delete()  # Their place is needed for those of the checkpoint.
        objective.save(checkpoints.params(step, wanted), output)
