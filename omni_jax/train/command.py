"""`omni-jax train`: from flags and TOML to a trained model, with progress on stderr.

Everything that can be checked is checked before the weights are read.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro import MISSING
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from omni_jax.distributed import is_primary
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.train import toml
from omni_jax.train.codes_command import CheckCodes, check_codes
from omni_jax.train.drafters.questions import Regenerate, run_regenerate
from omni_jax.train.drafters.recipes import DFlash, Eagle3
from omni_jax.train.dry_run import MAX_SHOWN, dry_run
from omni_jax.train.export import Export, chosen_step, export, placed
from omni_jax.train.loop import CONFIG, Trained, check_directory, steps_of, train
from omni_jax.train.lora.recipe import Lora
from omni_jax.train.plot import draw_loss
from omni_jax.train.settings import check
from omni_jax.train.sft import Sft
from omni_jax.train.talker import TalkerSft
from omni_jax.weights.locate import locate

# Loads these parts of a model onto a mesh.
Load = Callable[[Path, tuple[str, ...], str | None], Omni]


@dataclass(frozen=True)
class Plot:
    """Draw the loss of a run, also of one that is under way."""

    output: Positional[Path]
    """The run's directory."""


@dataclass(frozen=True)
class Train:
    """Train a model, or a part of it, on conversations; a run that was stopped goes on where it was."""

    recipe: OmitArgPrefixes[
        Annotated[Sft, subcommand(Sft.NAME)]
        | Annotated[Lora, subcommand(Lora.NAME)]
        | Annotated[TalkerSft, subcommand(TalkerSft.NAME)]
        | Annotated[DFlash, subcommand(DFlash.NAME)]
        | Annotated[Eagle3, subcommand(Eagle3.NAME)]
        | Annotated[Regenerate, subcommand("regenerate")]
        | Annotated[CheckCodes, subcommand("check-codes")]
        | Annotated[Plot, subcommand("plot")]
        | Annotated[Export, subcommand("export")]
    ]


AnyRecipe = Sft | Lora | TalkerSft | DFlash | Eagle3
RECIPES: dict[str, Any] = {kind.NAME: kind for kind in (Sft, Lora, TalkerSft, DFlash, Eagle3)}


def configured(arguments: Sequence[str]) -> Train | None:
    """The defaults of a command line that names a --config; None for any other.

    InputError for a file that states no configuration of the recipe.
    """
    if len(arguments) < 2 or arguments[0] != "train" or arguments[1] not in RECIPES:
        return None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config" and (equals or i + 1 < len(arguments)):
            path = Path(value if equals else arguments[i + 1]).expanduser()
            return Train(toml.read(RECIPES[arguments[1]], path, absent=MISSING))
    return None


def run_command(command: Train, load: Load) -> None:
    """Run a command to its end, and print where the result is; InputError for what cannot be used."""
    match command.recipe:
        case Plot(output):
            picture = draw_loss(output)
            if picture is None:
                raise InputError("a plot needs matplotlib: install omni_jax[train]")
            print(picture)
        case Export() as asked:
            _export(asked, load)
        case Regenerate() as asked:
            run_regenerate(replace(asked, model=locate(asked.model)))
        case CheckCodes() as asked:
            check_codes(replace(asked, model=locate(asked.model)))
        case recipe:
            _report(recipe, train_recipe(recipe, load))


def _export(asked: Export, load: Load) -> None:
    """Write the model of a run's checkpoint, and print where it is."""
    path = asked.run / CONFIG
    if not path.exists():
        raise InputError(f"{asked.run} holds no run ({CONFIG} is missing); name the directory of one")
    named = toml.read_table(path).get("recipe")
    if named not in RECIPES:
        raise InputError(f"{path}: states no recipe of {', '.join(RECIPES)}; name the directory of a run")
    recipe: Any = placed(toml.read(RECIPES[named], path), asked)
    step = chosen_step(recipe, asked)
    omni = load(recipe.run.model, recipe.PARTS, recipe.compute.mesh)
    export(recipe, step, recipe.objective(omni), omni.meshes["thinker"], asked.output)
    if is_primary():
        print(f"step {step}: {asked.output}")
        print(recipe.NEXT.format(asked.output), file=sys.stderr)


def _report(recipe: AnyRecipe, trained: Trained | None) -> None:
    """Print where the result is and what can be done with it; nothing after a dry run."""
    if trained is not None and is_primary():
        print(f"{trained.steps} steps, loss {trained.loss:.4g}: {trained.model}")
        print(recipe.NEXT.format(trained.model), file=sys.stderr)
        if trained.best_step not in (None, trained.steps):
            print(
                f"the loss was lowest at step {trained.best_step}, which omni-jax train export writes", file=sys.stderr
            )


def train_recipe(recipe: AnyRecipe, load: Load) -> Trained | None:
    """Train as a recipe says; None for a dry run, which is printed."""
    run = recipe.run
    paths = {"model": locate(run.model).absolute(), "data": tuple(path.absolute() for path in run.data)}
    # The default type is that of these devices, and a run does not go on in another.
    compute = replace(recipe.compute, dtype=recipe.compute.type())
    recipe = replace(recipe, run=replace(run, **paths), compute=compute)
    check(recipe)
    if not recipe.call.dry_run:
        check_directory(recipe)
    omni = load(recipe.run.model, recipe.PARTS, recipe.compute.mesh)
    objective, batches, mesh = recipe.objective(omni), recipe.batches(omni), omni.meshes["thinker"]
    if not recipe.call.dry_run:
        del omni  # What is trained has its own arrays.
        return train(recipe, objective, batches, mesh)
    report, first = dry_run(recipe, objective, batches, steps_of(recipe, batches), mesh)
    if is_primary():
        print(f"{report}\nfirst batch, what is learned in brackets:\n\n{recipe.shown(omni, first)[:MAX_SHOWN]}")
    return None
