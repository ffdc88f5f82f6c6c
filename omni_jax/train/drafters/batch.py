"""Batches for drafters: rows of text, the number of the batch, and perhaps hidden states that were made beforehand."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
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


class LookedAhead:
    """Batches whose next ones can be looked at; they are prepared once and still come next."""

    def __init__(self, batches: Batches):
        self.batches, self._next = batches, (batches.state(), batches.epoch)
        self._source: Iterator[Step] | None = None
        self._held = deque[tuple[Step, tuple[dict[str, Any], int]]]()

    @property
    def steps(self) -> int | None:
        """The number of batches of all epochs, None where these have no end."""
        return self.batches.steps

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the batch that comes next."""
        return self._next[1]

    def look(self, count: int) -> list[Step]:
        """The next `count` batches, or as many as are left."""
        self._source = self._source or iter(self.batches)
        while len(self._held) < count and (step := next(self._source, None)) is not None:
            self._held.append((step, (self.batches.state(), self.batches.epoch)))
        return [step for step, _ in islice(self._held, count)]

    def __iter__(self) -> Iterator[Step]:
        """The batches from the present position on."""
        while self.look(1):
            step, self._next = self._held.popleft()
            yield step

    def state(self) -> dict[str, Any]:
        """The position of the batch that comes next."""
        return self._next[0]

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.batches.restore(state)
        self._next, self._source = (self.batches.state(), self.batches.epoch), None
        self._held.clear()


class DraftBatches:
    """Batches of text as batches for drafters, numbered from 0; a position in them includes the number."""

    def __init__(self, batches: Batches, states_of: Callable[[TextBatch], np.ndarray] | None = None):
        """states_of: the states [B, n, T, D] that a batch brings; it brings none by default."""
        self.batches, self.number, self.states_of = batches, 0, states_of

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
            states = None if self.states_of is None else self.states_of(step.batch)
            yield replace(step, batch=DraftBatch(step.batch, np.asarray(number, np.uint32), states))

    def state(self) -> dict[str, Any]:
        """The position of the batch that comes next."""
        return {"number": self.number, "batches": self.batches.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.number = int(state["number"])
        self.batches.restore(state["batches"])
