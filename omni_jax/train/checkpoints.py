"""Checkpoints of a run: state, position in the data, and what the metrics were, each whole or not there at all.

    checkpoints/<step>/state      Orbax: the arrays of TrainState by their paths
    checkpoints/<step>/progress   JSON: all else that a run needs to go on
    checkpoints/<step>/metrics    JSON: the loss by which the best one is chosen

They are written while training goes on. One is written under another name and renamed when it is complete; what a run
that was killed left under such a name is removed by the next. Of the complete ones the latest and the best stay.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from omni_jax.errors import CheckpointError
from omni_jax.files import reason_of
from omni_jax.train.state import TrainState
from omni_jax.weights.orbax_paths import plain_path

FOLDER, STATE, PROGRESS, LOSS = "checkpoints", "state", "progress", "loss"


class Checkpoints:
    """The checkpoints of a run, by step; make one with `open_checkpoints`.

    CheckpointError, with what remains and the remedy, for what cannot be written or read; an error of a checkpoint that
    is being written comes with the next call.
    """

    def __init__(self, directory: Path, manager: Any):
        self.directory, self._manager = directory, manager

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

        with self._explained():
            arrays = ocp.args.PyTreeSave(_flat(state))
            items = ocp.args.Composite(**{STATE: arrays, PROGRESS: ocp.args.JsonSave(progress)})
            self._manager.save(step, args=items, metrics={LOSS: loss}, force=True)

    def restore(self, step: int, described: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and progress of a step; described: shapes, dtypes and shardings of the state."""
        import orbax.checkpoint as ocp

        flat = _flat(described)
        args = {
            path: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for path, x in flat.items()
        }
        items = ocp.args.Composite(
            **{STATE: ocp.args.PyTreeRestore(flat, restore_args=args), PROGRESS: ocp.args.JsonRestore()}
        )
        try:
            made = self._manager.restore(step, args=items)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.directory / str(step)}: cannot be read ({_reason(error)}); remove it, and the run goes on "
                "from the one before"
            ) from error
        arrays = [made[STATE][path] for path in flat]
        return jax.tree.unflatten(jax.tree.structure(described), arrays), made[PROGRESS]

    def wait(self) -> None:
        """Return when all that was saved is complete on the disk."""
        with self._explained():
            self._manager.wait_until_finished()

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
    from orbax.checkpoint import checkpoint_managers as managers
    from orbax.checkpoint import type_handlers

    # Splitting the writing of replicated arrays over their devices, Orbax's default, takes a hundred times as long.
    arrays = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler(use_replica_parallel=False))
    )
    handlers = {
        STATE: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=arrays),
        PROGRESS: ocp.JsonCheckpointHandler(),
    }
    best = managers.BestN(get_metric_fn=lambda metrics: metrics[LOSS], reverse=True, n=1)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(keep), best]),
        best_fn=lambda metrics: metrics[LOSS],
        best_mode="min",
        cleanup_tmp_directories=True,
    )
    with plain_path(output) as plain, _quiet():
        manager = ocp.CheckpointManager((plain / FOLDER).absolute(), options=options, item_handlers=handlers)
        try:
            yield Checkpoints(output / FOLDER, manager)
        finally:
            # What went wrong was raised by `wait`, or something else went wrong before.
            with suppress(Exception):
                manager.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from printing what it raises as well, of each of its threads."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(_nothing)
    sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else hook(what)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)
        sys.unraisablehook = hook


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _reason(error: Exception) -> str:
    """Why an array cannot be read or written: of what TensorStore says, the words of the system."""
    found = re.findall(r": ([^:]+) \[os_error_code", str(error))
    return found[-1].lower() if found else reason_of(error)


def _flat(state: TrainState) -> dict[str, Any]:
    """The arrays of a state by their paths, in the order of its tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two arrays of a state have one path"
    return flat
