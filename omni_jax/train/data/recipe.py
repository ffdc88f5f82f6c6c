"""What a kind of training states about its data, beside the machinery that is common to all.

The Thinker's is `samples.TextRecipe`; the Talker and drafters bring their own. An object crosses to worker processes
once, so it must pickle, and its module must not import jax: what `collate` returns is made a batch in the training
process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from omni_jax.rows.columns import Columns
from omni_jax.rows.row import Problem


class Sample(Protocol):
    """A part of a batch. length: its tokens, which rows are filled by. where: "file:line" of its row."""

    length: int
    where: str


class Collated(Protocol):
    """What a batch is made of, in NumPy.

    learned: bool, which tokens are learned. samples: "file:line" of each row in it. problems: samples that could not be
    used any more and were left out. tokens: those of its samples.
    """

    learned: np.ndarray
    samples: list[str]
    problems: list[Problem]
    tokens: int


class Recipe(Protocol):
    """How rows become samples, and samples a batch; both functions run in worker processes."""

    @property
    def columns(self) -> Columns:
        """The columns that its rows have."""
        ...

    def samples(self, row: dict[str, Any], folder: Path, where: str) -> Sequence[Any]:
        """The samples of a row without nulls; InputError for a row that cannot be used."""
        ...

    def collate(self, rows: Sequence[Sequence[Any]], count: int, width: int) -> Any:
        """`count` rows of `width` tokens, the first of which hold these samples: a `Collated`."""
        ...
