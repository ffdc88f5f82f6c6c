"""What a run writes down as it goes: metrics.csv, timings.csv, and both for TensorBoard.

metrics.csv follows from configuration and data alone: a run that was killed and went on has the same file, byte for
byte, as one that was not. Seconds and tokens per second, which do not, are in timings.csv. Both are cut back to what
they held at the checkpoint from which a run goes on.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, time
from typing import Any, cast

from omni_jax.errors import InputError
from omni_jax.files import reason_of
from omni_jax.train.step import Report

METRICS, TIMINGS, BOARD = "metrics.csv", "timings.csv", "tensorboard"


@dataclass
class Window:
    """Sums over the steps since the last row: of the loss, of its weight and of other metrics by name."""

    total: float = 0.0
    weight: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, report: Report) -> None:
        """Add what a step reported, on the host."""
        self.total += float(report.loss.total)
        self.weight += float(report.loss.weight)
        for name, value in report.loss.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + float(value)

    def means(self) -> dict[str, float]:
        """The loss and the other metrics, each divided by the weight."""
        return {name: value / self.weight for name, value in {"loss": self.total, **self.metrics}.items()}


@dataclass
class Progress:
    """Where a run is, apart from the arrays of its state; all of it is in each checkpoint.

    step, tokens: how many were taken. epoch: of the next batch. data: its position. since_save, since_row: of the loss.
    loss: that of the last row. sizes: bytes of the files that grow, by name.
    """

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    since_save: Window = field(default_factory=Window)
    since_row: Window = field(default_factory=Window)
    loss: float | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Progress":
        """The progress of a checkpoint."""
        windows = {name: Window(**values[name]) for name in ("since_save", "since_row")}
        return cls(**{**values, **windows})

    def values(self) -> dict[str, Any]:
        """The progress as values of JSON."""
        return asdict(self)


@contextmanager
def explained_writes(path: Path) -> Iterator[None]:
    """Turn the errors of writing a run's files into one that says what is not lost."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({reason_of(error)}); the checkpoints are safe: make room, and run this again "
            "to go on"
        ) from error


class Table:
    """A CSV file of numbers that grows by rows; one that exists is cut to at most `size` bytes, and to whole rows."""

    def __init__(self, path: Path, size: int):
        self.path = path
        with explained_writes(path):
            self._file = path.open("a+b")
            self._file.seek(0)
            held = self._file.read(size)
            self._file.truncate(held.rfind(b"\n") + 1)
            self._file.seek(0, os.SEEK_END)

    def add(self, row: Mapping[str, int | float]) -> None:
        """Append a row, below the names of its columns if it is the first one."""
        lines = [] if self._file.tell() else [",".join(row)]
        lines.append(",".join(str(value) if isinstance(value, int) else f"{value:.8g}" for value in row.values()))
        with explained_writes(self.path):
            self._file.write(("\n".join(lines) + "\n").encode())
            self._file.flush()

    def size(self) -> int:
        """The bytes of the file, which are safe on the disk on return."""
        with explained_writes(self.path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a row that could not be written before
            self._file.close()


class Board:
    """Metrics for TensorBoard in a file of their own, which hides those of earlier files from `step` on.

    Rows are written at once: where the disk is full, the thread of tensorboardX's own writer ends, and what waits for
    it waits without end.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self.directory, self._protocol = directory, cast(Any, event_pb2)
        with explained_writes(directory):
            directory.mkdir(exist_ok=True)
            self._file = EventsWriter(str(directory / "events"), f".{step}")
            session = self._protocol.SessionLog(status=self._protocol.SessionLog.START)
            self._file.write_event(self._protocol.Event(wall_time=time(), step=step, session_log=session))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step."""
        event = self._protocol.Event(wall_time=time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        with explained_writes(self.directory):
            self._file.write_event(event)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a row that could not be written before
            self._file.close()


class Records:
    """The files of a run's metrics, a context; they go on from `progress`. Only one process has them.

    speed: tokens per second, in the last row.
    """

    def __init__(self, output: Path, progress: Progress):
        self.tables = {name: Table(output / name, progress.sizes.get(name, 0)) for name in (METRICS, TIMINGS)}
        self._board = Board(output / BOARD, progress.step + 1)
        self._tokens, self._since, self.speed = progress.tokens, perf_counter(), 0.0

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *error: object) -> None:
        for table in self.tables.values():
            table.close()
        self._board.close()

    def write(self, progress: Progress, report: Report) -> None:
        """Write a row of what happened since the last one; report: of the last step, on the host."""
        own = {"gradient_norm": float(report.gradient_norm), "learning_rate": float(report.learning_rate)}
        metrics = progress.since_row.means() | own
        now = perf_counter()
        seconds, tokens = now - self._since, progress.tokens - self._tokens
        self._since, self._tokens, self.speed = now, progress.tokens, tokens / seconds
        timings = {"seconds": seconds, "tokens_per_second": self.speed}
        counts = {"tokens": progress.tokens, "epoch": progress.epoch}
        self.tables[METRICS].add({"step": progress.step, **metrics, **counts})
        self.tables[TIMINGS].add({"step": progress.step, **timings})
        self._board.add(progress.step, {**metrics, **timings})

    def sizes(self) -> dict[str, int]:
        """The sizes of the files, which are safe on the disk on return."""
        return {name: table.size() for name, table in self.tables.items()}
