"""Batches for drafters: rows of text, the number of the batch, and perhaps hidden states that were made beforehand."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from omni_jax.sharding import Array
from omni_jax.train.batch import TextBatch
from omni_jax.train.objective import Batches, Step


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class DraftBatch:
    """Rows for a drafter.

    text: the rows. number: uint32 [], how many batches came before; what is drawn for a batch follows from it. states:
    the target's hidden states [B, n, T, D], in the order of the objective's taps; None if the loss makes them.
    """

    text: TextBatch
    number: Array
    states: Array | None = None


class DraftBatches:
    """Batches of text as batches for drafters, numbered from 0; a position in them includes the number."""

    def __init__(self, batches: Batches):
        self.batches, self.number = batches, 0

    @property
    def steps(self) -> int | None:
        """The number of batches of all epochs, None where these have no end."""
        return self.batches.steps

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the batch that comes next."""
        return self.batches.epoch

    def __iter__(self) -> Iterator[Step]:
        """The batches from the present position on."""
        for step in self.batches:
            number, self.number = self.number, self.number + 1
            yield replace(step, batch=DraftBatch(step.batch, np.asarray(number, np.uint32)))

    def state(self) -> dict[str, Any]:
        """The position of the batch that comes next."""
        return {"number": self.number, "batches": self.batches.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.number = int(state["number"])
        self.batches.restore(state["batches"])
