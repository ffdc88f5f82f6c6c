"""The stage thinker: the untrained model, trained as a whole by the recipe sft on the rows of all senses."""

from collections.abc import Sequence
from pathlib import Path

import omni_jax
from omni_jax.errors import InputError
from omni_jax.train.command import train_recipe
from omni_jax.train.loop import Trained
from omni_jax.train.settings import Batching, Compute, Optimizer, Run
from omni_jax.train.sft import Sft
from scripts.nano.begin import write_beginning
from scripts.nano.rows import rows_path
from scripts.nano.senses import wordings

ROWS, LENGTH = 8, 512


def train_thinker(directory: Path, senses: Sequence[str], steps: int, rate: float, seed: int, workers: int) -> Trained:
    """Train on the rows of senses in `directory`, going on where it was: what the recipe's loop gives."""
    files = tuple(rows_path(directory, sense, "train") for sense in senses)
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise InputError(f"{missing[0]} is missing; run the stage data first")
    recipe = Sft(
        run=Run(
            model=write_beginning(directory / "begin", wordings(), seed),
            data=files,
            output=directory / "thinker",
            steps=steps,
            seed=seed,
            save_every=200,
        ),
        optimizer=Optimizer(learning_rate=rate, warmup_ratio=0.03, final_ratio=0.05, weight_decay=0.02),
        batch=Batching(rows=ROWS, max_length=LENGTH, workers=workers, coarse=True),
        compute=Compute(remat="none"),
        train_vision=True,
        train_audio=True,
        train_mergers=True,
    )
    trained = train_recipe(recipe, lambda model, parts, mesh: omni_jax.load(model, parts=parts, mesh=mesh))
    assert trained is not None
    return trained
