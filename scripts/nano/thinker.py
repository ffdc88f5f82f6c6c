"""The stage thinker: the untrained model, trained as a whole by the recipe sft on the rows of all senses."""

import json
from collections.abc import Sequence
from pathlib import Path

import omni_jax
from omni_jax.train.batch import MediaRows
from omni_jax.train.command import train_recipe
from omni_jax.train.data.samples import TextRecipe
from omni_jax.train.loop import Trained
from omni_jax.train.settings import Batching, Compute, Optimizer, Run
from omni_jax.train.sft import Sft
from scripts.nano.begin import FILE, check_beginning, write_beginning, write_whitened
from scripts.nano.origin import check_origin, rows_digest
from scripts.nano.pausing import load_parts
from scripts.nano.rows import rows_path
from scripts.nano.senses import wordings

ROWS, LENGTH = 8, 256
# Rows of each sense that the first layers are fitted to.
FITTED = 48


def train_thinker(directory: Path, senses: Sequence[str], steps: int, rate: float, seed: int, workers: int) -> Trained:
    """Train on the rows of senses in `directory`, going on where it was: what the recipe's loop gives.

    InputError for rows that are missing, or are others than those that training began with.
    """
    files = tuple(rows_path(directory, sense, "train") for sense in senses)
    begun = [directory / "begin", directory / "thinker"]
    check_origin(directory, "thinker", begun, {"rows": rows_digest(directory, senses)})
    recipe = Sft(
        run=Run(
            model=beginning(directory, files, seed),
            data=files,
            output=directory / "thinker",
            steps=steps,
            seed=seed,
            save_every=200,
        ),
        optimizer=Optimizer(
            optimizer="muon", learning_rate=rate, warmup_ratio=0.02, final_ratio=0.02, weight_decay=0.02
        ),
        batch=Batching(rows=ROWS, max_length=LENGTH, workers=workers, coarse=True),
        compute=Compute(remat="none"),
        train_vision=True,
        train_audio=True,
        train_mergers=True,
    )
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
