"""The steps of training, one after the other: deterministic, and resumed at any of them.

grain reads the plan in order, ahead of training, through threads that wait for worker processes. The state is the
number of the next step alone, because a batch follows from the data, the settings and its number.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.rows.row import Problem
from omni_jax.train.data.plan import Packing, Plan, PlannedBatch
from omni_jax.train.data.recipe import Recipe
from omni_jax.train.data.survey import Survey, report_of, survey
from omni_jax.train.data.workers import Workers, collate, result_of
from omni_jax.train.objective import Step

AHEAD = 2  # batches per worker that are prepared before they are asked for
MOST_LOST = 8  # batches one after the other of which nothing can be used: then not rows are broken, but the media gone


class Stream:
    """The batches of a dataset, as `train.objective.Batches` states them.

    steps: of all epochs, None where these have no end. epoch: that of the next step, from 0. problems: rows that were
    left out, those found while media were decoded last.
    """

    def __init__(
        self,
        found: Survey,
        workers: Workers,
        make: Callable[[Any], Any],
        packing: Packing,
        *,
        seed: int = 0,
        epochs: int | None = 1,
        strict: bool = False,
    ):
        """make: a batch of what the recipe's `collate` returns. strict: whether a medium that cannot be decoded is an
        error."""
        self.plan = Plan(found.lengths, packing, seed, epochs)
        self.problems = list(found.problems)
        self._found, self._workers, self._make, self._strict = found, workers, make, strict
        self._next = 0
        sizes = {"samples": len(found.samples), "tokens": int(found.lengths.sum())}
        self._identity = {"data": found.digest, **sizes, "seed": seed, **vars(packing)}

    @property
    def steps(self) -> int | None:
        return None if self.plan.epochs is None else len(self.plan)

    @property
    def epoch(self) -> int:
        return self.plan.epoch_of(self._next)

    def state(self) -> dict[str, Any]:
        """The number of the next step, and what it is a step of; plain JSON values."""
        return {"step": self._next, **self._identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on at the step of a state; InputError for a state of other data or settings."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                rounded = "a mesh that divides as many rows" if name == "rows" else "the same data and settings"
                raise InputError(
                    f"the run was begun with {name} {state.get(name)!r}, and this is {value!r}; resume it with "
                    f"{rounded}, or begin another"
                )
        self._next = state["step"]

    def __iter__(self) -> Iterator[Step]:
        """The steps that are left; a step whose samples have all become unusable is passed over.

        InputError where that happens `MOST_LOST` times in a row.
        """
        import grain

        # Threads only wait for workers; without these, each batch is made when it is asked for.
        threads = self._workers.count * AHEAD
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        batches = iter(grain.MapDataset.source(self.plan).map(self._collated).to_iter_dataset(options))
        batches.set_state({"next_index": self._next})
        used = self._next
        try:
            for collated in batches:
                self._next += 1
                self._note(collated.problems)
                if collated.learned.any():
                    used = self._next
                    yield Step(self._make(collated), collated.samples, collated.tokens)
                elif self._next - used == MOST_LOST:
                    raise InputError(
                        f"nothing of {MOST_LOST} batches one after the other can be used; make the media that the "
                        "reported rows name readable again, and run this again to go on"
                    )
        finally:
            batches.close()

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _collated(self, planned: PlannedBatch) -> Any:
        rows = [[self._found.samples[i] for i in row] for row in planned.rows]
        return result_of(self._workers.submit(collate, rows, self.plan.packing.rows, planned.width))

    def _note(self, problems: list[Problem]) -> None:
        if problems and self._strict:
            raise InputError(f"{problems[0].where}: {problems[0].why}")
        self.problems += problems
        if problems:
            print(f"batch {self._next} is without\n{report_of(problems)}", file=sys.stderr)


def open_stream(
    paths: Iterable[str | Path],
    recipe: Recipe,
    make: Callable[[Any], Any],
    packing: Packing,
    *,
    seed: int = 0,
    epochs: int | None = 1,
    workers: int = 0,
    strict: bool = False,
) -> Stream:
    """The batches of files and directories of files, all rows of which are read before this returns.

    make: a batch of what the recipe's `collate` returns. epochs: None for no end. workers: processes that prepare data,
    0 for none. strict: raise InputError at the first row that cannot be used, which else is left out. InputError where
    no row can be used. What is left out is said on stderr.
    """
    from omni_jax.distributed import is_primary

    helpers = Workers(recipe, workers)
    try:
        found = survey(paths, helpers, strict=strict)
    except BaseException:
        helpers.close()
        raise
    if is_primary() and (said := found.report()):
        print(said, file=sys.stderr)
    return Stream(found, helpers, make, packing, seed=seed, epochs=epochs, strict=strict)
