"""The stages words, look, mixed and thinker: the text model learns text, then to tell what it sees, then all senses.

    begin -> words/model -> sight/model (sight.py) -> look/model -> mixed/model -> thinker/model

A model that cannot copy yet learns it within hundreds of steps from text alone, and hardly ever from a mixture in which
one row of thirty asks for it. Reading needs as many rows, and most of all at the end (mixture.py).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import omni_jax
from omni_jax.errors import InputError
from omni_jax.train.batch import MediaRows
from omni_jax.train.command import AnyRecipe, train_recipe
from omni_jax.train.data.samples import TextRecipe
from omni_jax.train.loop import Trained
from omni_jax.train.settings import Batching, Compute, Optimizer, Run
from omni_jax.train.sft import Sft
from scripts.nano.begin import FILE, check_beginning, write_beginning, write_whitened
from scripts.nano.mixture import write_mixture
from scripts.nano.origin import check_origin, model_of
from scripts.nano.pausing import load_parts
from scripts.nano.rows import made_senses, rows_digest, rows_path
from scripts.nano.senses import wordings

ROWS, LENGTH = 8, 256
# The senses of text alone.
TEXT = ("add", "count", "remember", "repeat", "spell")
# The senses of single pictures.
PICTURES = ("compare", "read", "scene", "written")
# The senses of which the stage mixed takes each row twice.
TWICE = ("compare", "flash", "move", "red", "same", "when")
# Rows of the stage thinker.
MIXED = 230_000
# Rows of each sense that the first layers are fitted to.
FITTED = 48


class How(NamedTuple):
    """How long, how fast and in which order a stage trains.

    steps: None for all rows once. workers: processes that prepare data. left: the share of the learning rate at the
    last step.
    """

    steps: int | None
    rate: float
    seed: int
    workers: int
    left: float = 0.02


def train_words(directory: Path, how: How) -> Trained:
    """Train the text model alone on the senses of text, going on where it was.

    InputError for rows, wordings or a beginning other than those that training began with.
    """
    begun, words, origin = directory / "begin", directory / "words", {"rows": rows_digest(directory)}
    check_origin(directory, "begin", [begun, words], origin)
    model = beginning(directory, files_of(directory, made_senses(directory, "train")), how.seed)
    check_origin(directory, "words", [words], {"begin": model_of(model, "words"), **origin})
    return trained_by(recipe_of(model, files_of(directory, TEXT), words, how))


def train_look(directory: Path, how: How) -> Trained:
    """Train what the stage sight has made on the senses of pictures, going on where it was; errors as train_thinker."""
    return trained_by(replace(_after(directory, "sight", "look", PICTURES, how), train_audio=False))


def train_mixed(directory: Path, senses: Sequence[str], how: How) -> Trained:
    """Train what the stage look has made, text model and both encoders, on all senses, going on where it was.

    Errors as train_thinker.
    """
    recipe = _after(directory, "look", "mixed", senses, how._replace(left=0.3))
    again = files_of(directory, [sense for sense in senses if sense in TWICE])
    return trained_by(replace(recipe, run=replace(recipe.run, data=(*recipe.run.data, *again))))


def train_thinker(directory: Path, senses: Sequence[str], how: How, begun: Path | None = None) -> Trained:
    """Train what the stage mixed has made on all senses, those most that it knows least, going on where it was.

    begun: a model to begin with instead. InputError for rows or a model other than those that training began with.
    """
    recipe = _after(directory, "mixed", "thinker", senses, how, begun)
    data = write_mixture(directory, senses, MIXED, how.seed)
    return trained_by(replace(recipe, run=replace(recipe.run, data=(data,))))


def _after(directory: Path, before: str, stage: str, senses: Sequence[str], how: How, begun: Path | None = None) -> Sft:
    """The recipe of a stage that trains what the one before it has made, or `begun`; InputError for another origin."""
    model = begun or directory / before / "model"
    origin = {f"{before}/model": model_of(model, before), "rows": rows_digest(directory, senses)}
    check_origin(directory, stage, [directory / stage], origin)
    recipe = recipe_of(model, files_of(directory, senses), directory / stage, how)
    return replace(recipe, train_vision=True, train_audio=True, train_mergers=True)


def files_of(directory: Path, senses: Sequence[str]) -> tuple[Path, ...]:
    """The training rows of senses; InputError for those that are not there."""
    files = tuple(rows_path(directory, sense, "train") for sense in senses)
    if missing := [file for file in files if not file.exists()]:
        raise InputError(f"{missing[0]} is missing; run the stage data first")
    return files


def recipe_of(model: Path, files: tuple[Path, ...], output: Path, how: How) -> Sft:
    """The recipe that trains the text model of `model`."""
    return Sft(
        run=Run(model=model, data=files, output=output, steps=how.steps, seed=how.seed, save_every=200),
        optimizer=Optimizer(
            optimizer="muon", learning_rate=how.rate, warmup_ratio=0.02, final_ratio=how.left, weight_decay=0.1
        ),
        batch=Batching(rows=ROWS, max_length=LENGTH, workers=how.workers, coarse=True),
        compute=Compute(remat="none"),
    )


def trained_by(recipe: AnyRecipe) -> Trained:
    """What the recipe's loop gives."""
    trained = train_recipe(recipe, load_parts)
    assert trained is not None
    return trained


def beginning(directory: Path, files: Sequence[Path], seed: int) -> Path:
    """The directory of the model that training begins with; its first layers suit the first rows of `files`."""
    model = directory / "begin"
    if (model / FILE).exists():
        check_beginning(model, wordings(), seed)
        return model
    drawn = write_beginning(directory / "drawn", wordings(), seed)
    recipe = TextRecipe.of(omni_jax.load(drawn, parts=("thinker",)).processor, LENGTH, coarse=True)
    media = []
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()[:FITTED]]
        packed = recipe.collate([recipe.samples(row, file.parent, file.name) for row in rows], len(rows), LENGTH)
        if packed.media is not None:
            media.append(MediaRows(*packed.media))
    return write_whitened(model, drawn, media, seed)
