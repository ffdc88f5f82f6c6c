"""A run that can be killed at any time: results are appended as they come, and a rerun goes on where it ended.

The output directory holds

    run.json               what the results depend on: settings, model, dataset; a run with others is refused
    results-<n>.jsonl      one line a sample, of process n; each is written whole and reaches the disk before the next
    report.md, *.png, summary.json   when all samples are done (`report`)

A line that was being written when the process died has no end and is cut off; its sample is done again.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import Any

from omni_jax.distributed import meet
from omni_jax.errors import InputError
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.processes import Share
from omni_jax.evaluate.tasks import Means, Result, Settings, results

# Seconds until every host sees a new file; NFS remembers for a minute, unless told otherwise, that none was there.
SEEN_SECONDS = 90


def try_directory(directory: Path, depends: dict[str, Any]) -> None:
    """Make a directory unless it is there; InputError if it cannot be written or holds the results of another run."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise _unwritable(directory, error) from error
    if (directory / "run.json").exists():
        _check_same(directory / "run.json", depends)
    elif any(directory.glob("results-*.jsonl")):
        raise InputError(f"{directory} has results but no run.json to say of what; choose another directory")


class Results:
    """The results of one run in its directory; a context, in which this process's file is its own.

    held: what the directory held on entering. depends: what the results depend on, plain JSON values. Entering raises
    InputError for a directory that cannot be written, that holds another run or is in use.
    """

    def __init__(self, directory: Path, depends: dict[str, Any], share: Share):
        self.directory, self.depends, self.share = directory, depends, share
        self.path = directory / f"results-{share.process:05d}.jsonl"
        self.held: list[Result] = []
        self.descriptor: int | None = None

    def __enter__(self) -> "Results":
        try_directory(self.directory, self.depends)
        try:
            if self.share.reports:
                _state(self.directory, self.depends)
            meet("stated")
            _wait_for(self.directory / "run.json")
            _check_same(self.directory / "run.json", self.depends)
            if self.share.writes:
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                _lock(self.descriptor, self.path)
                _mend(self.path)
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        meet("mended")
        self.held = read_all(self.directory)
        meet("read")
        return self

    def __exit__(self, *error: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that this process has to do."""
        done = {result["id"] for result in self.held}
        return self.share.of([sample for sample in samples if sample.id not in done])

    def add(self, result: Result) -> None:
        """Append a result, which is safe on the disk on return, unless another process writes for this one."""
        if self.descriptor is None:
            return
        line = (json.dumps(result, ensure_ascii=False) + "\n").encode()
        try:
            written = os.write(self.descriptor, line)
            os.fsync(self.descriptor)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error}); make room and run this again") from error
        if written != len(line):
            raise InputError(f"{self.path}: the disk is full; make room and run this again")


def run(means: Means, samples: Sequence[Sample], written: Results, fatal: bool) -> Iterator[Result]:
    """Run samples and write each result before it is yielded.

    fatal: whether a sample that cannot be used ends the run, which raises InputError; it is written down otherwise.
    """
    for result in results(means, samples):
        if fatal and "error" in result:
            raise InputError(f"sample {result['id']}: {result['error']}")
        written.add(result)
        yield result


def read_all(directory: Path) -> list[Result]:
    """All results in a directory."""
    return [result for file in sorted(directory.glob("results-*.jsonl")) for result in read_results(file)]


def read_results(file: Path) -> Iterator[Result]:
    """The results in a file, whole lines only; InputError for a line that is no result."""
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            result = json.loads(line)
            if not isinstance(result, dict) or "id" not in result:
                raise ValueError("no result of a sample")
        except ValueError as error:
            raise InputError(
                f"{file}:{number} is damaged ({error}); remove the line, and its sample is done again"
            ) from error
        yield result


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or, where this is interrupted, as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def settings_of(settings: Settings, model: str, dataset: str, drafter: str | None) -> dict[str, Any]:
    """What the results depend on, as plain JSON values. model, dataset: their digests."""
    return json.loads(json.dumps({**asdict(settings), "model": model, "dataset": dataset, "drafter": drafter}))


def _unwritable(directory: Path, error: OSError) -> InputError:
    return InputError(f"{directory} cannot be written ({error}); choose another directory")


def _state(directory: Path, depends: dict[str, Any]) -> None:
    """Write run.json unless it is there."""
    path = directory / "run.json"
    if path.exists():
        return
    write_whole(path, json.dumps(depends, indent=2, ensure_ascii=False) + "\n")


def _lock(descriptor: int, path: Path) -> None:
    """Keep other runs from writing this file, where the file system knows locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{path} is being written by another run; wait for it, or choose another directory") from error
    except OSError:
        return


def _wait_for(path: Path) -> None:
    """Give a file that another host has written time to be seen here: shared file systems remember what was missing."""
    until = monotonic() + SEEN_SECONDS
    while not path.exists() and monotonic() < until:
        sleep(0.5)


def _mend(file: Path) -> None:
    """Cut off a last line without an end."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def _check_same(path: Path, depends: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); choose another output directory") from error
    names = [name for name in {**before, **depends} if before.get(name) != depends.get(name)]
    if names:
        differences = "; ".join(f"{name} was {before.get(name)!r}, is {depends.get(name)!r}" for name in names)
        raise InputError(f"{path.parent} holds another run ({differences}); choose another directory for this one")
