"""The one loop: an objective, batches and settings in; checkpoints, metrics and what users load out.

The directory of a run holds

    config.toml              its settings; a run with others is refused
    checkpoints/<step>/      the latest and the best (`checkpoints`)
    metrics.csv, timings.csv, tensorboard/, loss.png
    model/                   what users load, at the end

A run that was stopped, however it was, goes on from its latest checkpoint when it is started again, and ends with the
same parameters and metrics as if it had not been stopped.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from omni_jax import process
from omni_jax.distributed import barrier, is_primary, min_over_processes
from omni_jax.errors import InputError
from omni_jax.files import lock, reason_of, write_whole
from omni_jax.sharding import place_rows
from omni_jax.train import toml
from omni_jax.train.checkpoints import Checkpoints, open_checkpoints
from omni_jax.train.metrics import Progress, Records, Window, explained_writes
from omni_jax.train.objective import Batches, Objective, Step
from omni_jax.train.optimizer import optimizer_of, schedule_of
from omni_jax.train.plot import draw_loss
from omni_jax.train.settings import Recipe, changed, check
from omni_jax.train.state import TrainState, begin, described, shardings_of
from omni_jax.train.step import Report, Sums, programs

CONFIG, MODEL = "config.toml", "model"
# Rows that an error names.
MAX_NAMED = 8


@dataclass(frozen=True)
class Trained:
    """What a run ended with: its steps, its last loss, the step with the lowest one, and where the model is."""

    steps: int
    loss: float | None
    best_step: int | None
    model: Path


def train(recipe: Recipe, objective: Objective, batches: Batches, mesh: Mesh | None = None) -> Trained:
    """Train to the end, from the beginning or from the latest checkpoint of the run in `recipe.run.output`.

    mesh: the devices over which parameters and rows are split; None for one device.

    InputError for settings that cannot be, a directory of something else or of a run with other settings, data without
    a batch, and a step whose loss is not finite or that has nothing to learn, which leaves the last checkpoint;
    CheckpointError for what cannot be written. The first interrupt of a command saves a checkpoint and ends it.
    """
    check(recipe)
    steps_of(recipe, batches)
    note = f"a checkpoint is saved first, and the same command goes on with what {recipe.run.output} holds"
    with (
        claimed(recipe),
        process.finishing(note),
        open_checkpoints(recipe.run.output, recipe.run.keep) as checkpoints,
    ):
        running = _Running(recipe, objective, batches, mesh, checkpoints)
        with Records(recipe.run.output, running.progress) if is_primary() else nullcontext() as records:
            running.run(records)
        return running.finished()


def steps_of(recipe: Recipe, batches: Batches) -> int:
    """How many steps a run has; InputError for data without a batch."""
    if batches.steps == 0:
        named = ", ".join(str(path) for path in recipe.run.data)
        raise InputError(f"{named}: no row can be trained on; give rows in which an assistant answers")
    if recipe.run.steps is not None:
        return recipe.run.steps
    if batches.steps is None:
        raise InputError("the data have no end; say with --steps how long to train")
    return ceil(batches.steps / recipe.optimizer.accumulation)


class _Running:
    """A run under way: its state on the devices, its progress on the host."""

    def __init__(self, recipe: Recipe, objective: Objective, batches: Batches, mesh: Mesh | None, held: Checkpoints):
        self.recipe, self.objective, self.batches, self.mesh = recipe, objective, batches, mesh
        self.checkpoints, self.progress, self.steps = held, Progress(), steps_of(recipe, batches)
        optimizer = optimizer_of(recipe.optimizer, self.steps, objective.axes)
        shardings = shardings_of(objective, optimizer, mesh)
        self.programs = programs(objective, optimizer, schedule_of(recipe.optimizer, self.steps), shardings, mesh)
        self.state = self._resumed(described(objective, optimizer, mesh)) or begin(objective, optimizer, mesh)

    def _resumed(self, wanted: TrainState) -> TrainState | None:
        """The state of the latest checkpoint, with progress and data set to it; None if there is no checkpoint."""
        latest = max(self.checkpoints.steps, default=None)
        if latest is None:
            return None
        for array in jax.tree.leaves(self.objective.params):
            array.delete()  # Their place is needed for those of the checkpoint.
        state, values = self.checkpoints.restore(latest, wanted)
        self.progress = Progress.read(values)
        self.batches.restore(self.progress.data)
        if is_primary():
            print(f"going on after step {latest} of {self.steps}", file=sys.stderr)
        return state

    def run(self, records: Records | None) -> None:
        """Take the steps that are left, with a bar on stderr, and save checkpoints."""
        shown = None if records else True
        with tqdm(total=self.steps, initial=self.progress.step, unit="step", file=sys.stderr, disable=shown) as bar:
            source, stop, trouble = iter(self.batches), False, None
            taken = self._take(source)
            sums = self.programs.empty(taken[0].batch) if taken else Sums(None, None)
            while taken:
                for one in taken:
                    batch = place_rows(one.batch, self.mesh)
                    sums = self.programs.add(self.state.params, self.objective.frozen, batch, sums)
                self.state, sums, report = self.programs.update(self.state, sums)
                position = {"data": self.batches.state(), "epoch": self.batches.epoch}
                # The host prepares what follows while the devices compute.
                following, trouble = self._following(source)
                report = jax.device_get(report)
                self._count(report, taken, position)
                stop = interrupted()
                ends = stop or trouble is not None
                self._record(report, records, bar, last=not ends and not following, save=ends)
                taken = [] if ends else following
        self.checkpoints.wait()
        if stop:
            raise KeyboardInterrupt
        if trouble is not None:
            raise trouble
        if not self.progress.step:
            raise InputError("no batch of the data can be used any more; mend the rows that were reported")

    def _take(self, source: Iterator[Step], ahead: int = 0) -> list[Step]:
        """The batches of a step, `ahead` of the one that comes next; none behind the last step, or the last batch."""
        left = self.steps - self.progress.step - ahead
        return list(islice(source, self.recipe.optimizer.accumulation)) if left > 0 else []

    def _following(self, source: Iterator[Step]) -> tuple[list[Step], Exception | None]:
        """The batches of the step after this one, or why there are none, so that this one can be saved first.

        That takes all processes, of which one alone may be in trouble; but all are interrupted, and workers with them.
        """
        try:
            return self._take(source, ahead=1), None
        except Exception as error:
            if jax.process_count() > 1 and not process.interrupted():
                raise
            return [], error

    def _count(self, report: Report, taken: list[Step], position: dict[str, Any]) -> None:
        """Count a step that was taken, behind which the data are at `position`; InputError if it could not be taken."""
        progress = self.progress
        if not report.applied:
            raise InputError(self._refusal(report, taken))
        progress.step += 1
        progress.tokens += sum(one.tokens for one in taken)
        progress.data, progress.epoch = position["data"], position["epoch"]
        progress.since_row.add(report)
        progress.since_save.add(report)

    def _record(self, report: Report, records: Records | None, bar: tqdm, last: bool, save: bool) -> None:
        """Show a step, write a row and save a checkpoint, each where it is due.

        last: nothing comes behind this step. save: whether a checkpoint is due in any case.
        """
        progress, run = self.progress, self.recipe.run
        if progress.step % run.log_every == 0 or last:
            progress.loss = progress.since_row.means()["loss"]
            if records:
                records.write(progress, report)
                bar.set_postfix_str(f"loss {progress.loss:.4g}, {records.speed:,.0f} token/s", refresh=False)
            progress.since_row = Window()
        bar.update()
        if progress.step % run.save_every == 0 or last or save:
            loss, progress.since_save = progress.since_save.means()["loss"], Window()
            progress.sizes = records.sizes() if records else {}
            self.checkpoints.save(self.state, progress.step, progress.values(), loss)

    def _refusal(self, report: Report, taken: list[Step]) -> str:
        """Why a step could not be taken, its rows, and what to do."""
        rows = [row for one in taken for row in one.samples]
        named = ", ".join(rows[:MAX_NAMED]) + (f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else "")
        what = f"the loss is {report.loss.total:g}"
        remedy = "begin another run with a lower --learning-rate, or without the row that causes it"
        if report.loss.weight == 0:
            what, remedy = "no token is to be learned, all are masked", "begin another run without these rows"
        elif isfinite(report.loss.total):
            what = f"the norm of the gradient is {report.gradient_norm:g}"
        self.checkpoints.wait()
        latest = max(self.checkpoints.steps, default=None)
        kept = "there is no checkpoint yet" if latest is None else f"the checkpoint of step {latest} is kept"
        return f"step {self.progress.step + 1}: {what}, in {named}; {kept}: {remedy}"

    def finished(self) -> Trained:
        """Write what users load, unless it is there, and the plot."""
        run, best = self.recipe.run, self.checkpoints.best
        params = self.state.params
        del self.state  # Writing takes memory, and moments are not needed any more.
        if not (run.output / MODEL).exists():
            self.objective.save(params, run.output / MODEL)
        barrier("saved")
        if is_primary():
            with explained_writes(run.output):
                draw_loss(run.output)
        return Trained(self.progress.step, self.progress.loss, best, run.output / MODEL)


def interrupted() -> bool:
    """Whether the command was interrupted, in any of its processes: all of them must save together."""
    if jax.process_count() == 1:
        return process.interrupted()
    return min_over_processes(0 if process.interrupted() else 1) == 0


@contextmanager
def claimed(recipe: Recipe) -> Iterator[None]:
    """The run's directory, which is made for it or holds a run of the same settings, and is nobody else's meanwhile."""
    output, path = recipe.run.output, recipe.run.output / CONFIG
    check_directory(recipe)
    try:
        if is_primary() and not path.exists():
            output.mkdir(parents=True, exist_ok=True)
            write_whole(path, toml.write(recipe))
        barrier("claimed")
        descriptor = os.open(path, os.O_RDWR)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({reason_of(error)}); choose another directory") from error
    try:
        if is_primary():
            lock(descriptor, output)
        yield
    finally:
        os.close(descriptor)


def check_directory(recipe: Recipe) -> None:
    """InputError if a run's directory holds a run with other settings, which the error names, or something else."""
    output, path = recipe.run.output, recipe.run.output / CONFIG
    if path.exists():
        differences = changed(toml.read(type(recipe), path), recipe)
        if differences:
            raise InputError(
                f"{output} holds another run ({'; '.join(differences[:MAX_NAMED])}); choose another directory, or give "
                "the settings that it began with"
            )
        return
    try:
        # A run that was killed while it wrote its settings leaves a hidden file.
        held = output.exists() and [path for path in output.iterdir() if not path.name.startswith(f".{CONFIG}")]
    except OSError as error:
        raise InputError(f"{output} cannot be read ({reason_of(error)}); choose another directory") from error
    if held:
        raise InputError(f"{output} holds something else than a run ({CONFIG} is missing); choose another directory")
