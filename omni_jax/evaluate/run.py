"""A run that can be killed at any time: results are appended as they come, and a rerun goes on where it ended.

The output directory holds

    run.json               what the results depend on: settings, model, dataset; a run with others is refused
    results-<n>.jsonl      one line per sample, of process n; each is written whole and reaches the disk before the next
    report.md, *.png, summary.json   when all samples are done (`report`)

A line that was being written when the process died has no end and is cut off; its sample is done again. So is a sample
that failed, and one whose media have changed since: its new result is one more line (`report.current_results` chooses).
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import Any

from omni_jax.distributed import barrier
from omni_jax.errors import InputError
from omni_jax.evaluate.context import TaskContext
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.processes import Share
from omni_jax.evaluate.settings import RunSettings
from omni_jax.evaluate.stored import Result, StoredResults, fits
from omni_jax.evaluate.tasks import results
from omni_jax.files import lock, read_object, reason_of, write_whole
from omni_jax.process import check
from omni_jax.rows.files import RESULTS, RUN

# Seconds until every host sees a new file; by default, NFS remembers for a minute that there was none.
SEEN_SECONDS = 90
# What a run writes in addition to its results.
WRITTEN = (RUN, "report.md", "summary.json", "lengths.png", "accepted.png", "categories.png")
AGAIN = "make room and run this again"


def claim_directory(directory: Path, fingerprint: dict[str, Any]) -> StoredResults:
    """Make a directory for a run unless it is there: the results that it holds.

    fingerprint: what the results depend on, plain JSON values. InputError if the directory cannot be written or holds
    the results of another run.
    """
    _check_directory(directory, fingerprint)
    stored = StoredResults(directory)
    stored.read()
    return stored


def _check_directory(directory: Path, fingerprint: dict[str, Any]) -> None:
    """As `claim_directory`, without a look at the results."""
    check_writable(directory)
    if (directory / RUN).exists():
        _check_same(directory / RUN, fingerprint)
    elif any(directory.glob(RESULTS)):
        raise InputError(f"{directory} has results but no run.json to say of what; choose another directory")


def check_writable(directory: Path) -> None:
    """Make a directory unless it is there; InputError unless all that a run writes can be written there."""
    try:
        # Where a link leads, which may not be there yet.
        Path(os.path.realpath(directory)).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
        wrong = [path for name in WRITTEN if (path := directory / name).exists() and not path.is_file()]
    except OSError as error:
        raise _unwritable(directory, error) from error
    if wrong:
        raise InputError(f"{wrong[0]} is not a regular file, and one must be written there; choose another directory")


@contextmanager
def safe_results(directory: Path) -> Iterator[None]:
    """Explain that nothing is lost when a report cannot be written."""
    try:
        yield
    except OSError as error:
        remedy = "the results are safe: make room, and run this again to have it written"
        raise InputError(f"{directory}: the report cannot be written ({reason_of(error)}); {remedy}") from error


class Results:
    """The results of one run in its directory; a context, in which this process's file is its own.

    held: what the directory held on entering. fingerprint, stored: as of `claim_directory`. Entering raises InputError
    for a directory that cannot be written, that holds another run or is in use.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any], share: Share, stored: StoredResults | None = None):
        self.directory, self.fingerprint, self.share = directory, fingerprint, share
        self.stored = stored or StoredResults(directory)
        self.path = directory / f"results-{share.process:05d}.jsonl"
        self.held: list[Result] = []
        self.descriptor: int | None = None

    def __enter__(self) -> "Results":
        _check_directory(self.directory, self.fingerprint)
        try:
            if self.share.reports:
                _state(self.directory, self.fingerprint)
            barrier("stated")
            _wait_for(self.directory / RUN)
            _check_same(self.directory / RUN, self.fingerprint)
            if self.share.writes:
                self.descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                lock(self.descriptor, self.path)
                _mend(self.path)
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        barrier("mended")
        self.held = self.stored.read()
        barrier("read")
        return self

    def __exit__(self, *error: object) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)

    def remaining(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that this process must run: those without a result, that failed, or whose media have changed."""
        done = {one["id"] for one in self.held if "error" not in one}
        done -= {sample.id for sample in self.changed(samples)}
        return self.share.of([sample for sample in samples if sample.id not in done])

    def changed(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that have been scored, but never with the media that they name now."""
        known = {sample.id: sample for sample in samples}
        scored = [one for one in self.held if "error" not in one and one["id"] in known]
        valid = {one["id"] for one in scored if fits(one, known[one["id"]])}
        return [known[name] for name in dict.fromkeys(one["id"] for one in scored) if name not in valid]

    def add(self, result: Result) -> None:
        """Append a result, which is safe on the disk on return, unless another process writes for this one.

        A sample that fails again as it did before is not written again.
        """
        if self.descriptor is None or "error" in result and result in self.held:
            return
        # Half of a surrogate pair, which no file holds as text, becomes its JSON escape.
        line = (json.dumps(result, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            written = os.write(self.descriptor, line)
            os.fsync(self.descriptor)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({reason_of(error)}); {AGAIN}") from error
        if written != len(line):
            raise InputError(f"{self.path}: the disk is full; {AGAIN}")


def run(context: TaskContext, samples: Sequence[Sample], written: Results, fatal: bool) -> Iterator[Result]:
    """Run samples and write each result before it is yielded; an interrupt ends the run between two of them.

    fatal: whether a sample that cannot be used ends the run, which raises InputError; it is written down otherwise.
    """
    for result in results(context, samples):
        if fatal and "error" in result:
            raise InputError(f"sample {result['id']}: {result['error']}")
        written.add(result)
        yield result
        check()


def fingerprint_of(settings: RunSettings, model: str, dataset: str, drafter: str | None) -> dict[str, Any]:
    """What the results depend on, as plain JSON values. model, dataset, drafter: their digests."""
    return json.loads(json.dumps({**settings.stored(), "model": model, "dataset": dataset, "drafter": drafter}))


def _unwritable(directory: Path, error: OSError) -> InputError:
    return InputError(f"{directory} cannot be written ({reason_of(error)}); choose another directory")


def _state(directory: Path, fingerprint: dict[str, Any]) -> None:
    """Write run.json unless it is there."""
    path = directory / RUN
    if path.exists():
        return
    write_whole(path, json.dumps(fingerprint, indent=2, ensure_ascii=False) + "\n")


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


def _check_same(path: Path, fingerprint: dict[str, Any]) -> None:
    before = read_object(path, error=InputError, remedy="choose another output directory")
    names = [name for name in {**before, **fingerprint} if before.get(name) != fingerprint.get(name)]
    if names:
        differences = "; ".join(
            f"{name} was {before.get(name)!r}, is {fingerprint.get(name)!r}"[:200] for name in names[:9]
        )
        remedy = "choose another directory for this one; runs of other versions are not resumed"
        raise InputError(f"{path.parent} holds another run ({differences}); {remedy}")
