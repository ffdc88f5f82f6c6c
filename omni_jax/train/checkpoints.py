"""Checkpoints of a run: state, position in the data, and what the metrics were, each whole or not there at all.

    checkpoints/<step>/state      Orbax: the arrays of TrainState by their paths
    checkpoints/<step>/progress   JSON: all else that a run needs to go on
    checkpoints/<step>/metrics    JSON: the loss by which the best one is chosen

They are written while training goes on. One is written under another name and renamed when it is complete, and renamed
again before it is removed; what a run that was killed left under such a name is removed by the next. Of the complete
ones the latest and the best stay.
"""

import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from omni_jax.distributed import barrier, is_primary
from omni_jax.errors import CheckpointError
from omni_jax.files import reason_of
from omni_jax.train.state import TrainState
from omni_jax.weights.orbax_paths import plain_path

FOLDER, STATE, PROGRESS, LOSS = "checkpoints", "state", "progress", "loss"
# The end of the name of a checkpoint that is being removed.
REMOVED = ".removed"
# Within the paths of Orbax's own code.
ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


class Checkpoints:
    """The checkpoints of a run, by step; make one with `open_checkpoints`.

    CheckpointError, with what remains and the remedy, for what cannot be written or read; an error of a checkpoint that
    is being written comes with the next call.
    """

    def __init__(self, directory: Path, manager: Any, keep: int):
        self.directory, self._manager, self._keep = directory, manager, keep

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the lowest loss."""
        losses = {step: self._manager.metrics(step)[LOSS] for step in self.steps}
        return min(losses, key=lambda step: losses[step]) if losses else None

    def save(self, state: TrainState, step: int, progress: dict[str, Any], loss: float) -> None:
        """Begin to write a checkpoint; the state may be changed on return.

        progress: values of JSON. loss: what the best checkpoint is chosen by.
        """
        import orbax.checkpoint as ocp

        self.wait()
        with self._explained():
            arrays = ocp.args.PyTreeSave(_flat(state))
            items = ocp.args.Composite(**{STATE: arrays, PROGRESS: ocp.args.JsonSave(progress)})
            self._manager.save(step, args=items, metrics={LOSS: loss}, force=True)

    def restore(self, step: int, described: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and progress of a step; described: shapes, dtypes and shardings of the state."""
        flat = _flat(described)
        arrays, progress = self._read(step, flat)
        return jax.tree.unflatten(jax.tree.structure(described), [arrays[path] for path in flat]), progress

    def params(self, step: int, described: Any) -> Any:
        """The parameters of a step, without the rest of its state; described: their shapes, dtypes and shardings."""
        flat = _flat(TrainState((), described, ()))
        arrays, _ = self._read(step, flat)
        return jax.tree.unflatten(jax.tree.structure(described), [arrays[path] for path in flat])

    def _read(self, step: int, flat: dict[str, Any]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Arrays of a step by their paths, as described, and its progress."""
        import orbax.checkpoint as ocp

        args = {
            path: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for path, x in flat.items()
        }
        wanted = ocp.args.PyTreeRestore(flat, restore_args=args, partial_restore=True)
        items = ocp.args.Composite(**{STATE: wanted, PROGRESS: ocp.args.JsonRestore()})
        try:
            made = self._manager.restore(step, args=items)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.directory / str(step)}: cannot be read ({_reason(error)}); remove it, and the run goes on "
                "from the one before"
            ) from error
        return made[STATE], made[PROGRESS]

    def wait(self) -> None:
        """Return when all that was saved is complete on the disk, and what is not to stay is removed."""
        with self._explained():
            self._manager.wait_until_finished()
            stay = {*self.steps[-self._keep :], self.best}
            gone = [step for step in self.steps if step not in stay]
            if is_primary():
                for step in gone:
                    remove(self.directory / str(step))
            barrier("removed")
            if gone:
                self._manager.reload()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            held = sorted(self._manager.all_steps(read=True))
            kept = f"those of steps {held} are complete" if held else "there is none yet"
            raise CheckpointError(
                f"{self.directory}: a checkpoint cannot be written ({_reason(error)}); {kept}: make room, and run "
                "this again to go on"
            ) from error


@contextmanager
def open_checkpoints(output: Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints in a run's directory; keep: how many of the latest stay."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    # Splitting the writing of replicated arrays over their devices, Orbax's default, takes a hundred times as long.
    arrays = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler(use_replica_parallel=False))
    )
    handlers = {
        STATE: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=arrays),
        PROGRESS: ocp.JsonCheckpointHandler(),
    }
    # What stays is decided here, because Orbax does not remove a checkpoint as a whole.
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[LOSS], best_mode="min", cleanup_tmp_directories=True
    )
    if is_primary():
        for left in (output / FOLDER).glob(f".*{REMOVED}"):
            shutil.rmtree(left)
    barrier("tidied")
    with plain_path(output) as plain, _quiet():
        manager = ocp.CheckpointManager((plain / FOLDER).absolute(), options=options, item_handlers=handlers)
        try:
            yield Checkpoints(output / FOLDER, manager, keep)
        finally:
            # What went wrong was raised by `wait`, or something else went wrong before.
            with suppress(Exception):
                manager.close()


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, which is never seen in part."""
    hidden = checkpoint.with_name(f".{checkpoint.name}{REMOVED}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from printing what it raises as well, of each of its threads and tasks."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(_nothing)
    # For good: a task is reported when it is collected, which may be at the end of the process.
    logging.getLogger("asyncio").addFilter(_of_others)
    sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else hook(what)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)
        sys.unraisablehook = hook


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _of_others(record: logging.LogRecord) -> bool:
    """Not about what Orbax left, such as a second array that was not written: the error of the first was raised."""
    files = (frame.filename for frame in traceback.extract_tb(record.exc_info[2] if record.exc_info else None))
    return not any(ORBAX in file for file in files)


def _reason(error: Exception) -> str:
    """Why an array cannot be read or written: where TensorStore names the system's error, the words for its number."""
    found = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return os.strerror(int(found[1])).lower() if found else reason_of(error)


def _flat(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by their paths, in the order of its tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two arrays of a state have one path"
    return flat
