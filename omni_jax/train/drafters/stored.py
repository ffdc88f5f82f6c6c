"""Hidden states of the target in files, so that it runs once for all epochs and needs no memory while a drafter trains.

The directory holds

    states.json                   what they are of: the numbers of the states, their type, the model, how many batches
    batch-<n>.safetensors         token_ids, labels, first_seen, states of one batch, read memory-mapped
    index.jsonl                   a line for each batch that is complete: its rows of data, its tokens, where data go on
    complete                      an empty file, once no batch is left

A file appears when it is complete, and its line after it, so a run that was stopped goes on with the next batch.
Batches stay as they are; their order is drawn anew for each epoch, and so are anchors.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import parse_json, read_object, reason_of
from omni_jax.train.batch import TextBatch
from omni_jax.train.drafters.batch import DraftBatch
from omni_jax.train.objective import Batches, Step
from omni_jax.weights.headers import NUMPY_DTYPES, read_header

ABOUT, INDEX, COMPLETE = "states.json", "index.jsonl", "complete"
ARRAYS = ("token_ids", "labels", "first_seen")


def store_states(
    directory: Path, batches: Batches, about: dict[str, Any], states_of: Callable[[TextBatch], jax.Array]
) -> int:
    """Store batches with their hidden states, going on where a stopped run ended: how many were made.

    batches: one epoch of them, some of which may have become unusable. about: what the states depend on, plain JSON
    values with "taps" and "dtype". states_of: hidden states [n, B, T, D] of a batch. InputError for a directory that
    cannot be written or holds other states.
    """
    count = batches.steps
    if count is None:
        raise InputError("the data have no end, and hidden states of one epoch are stored; leave out the steps")
    if jax.process_count() > 1 and not (directory / COMPLETE).exists():
        raise InputError(f"{directory}: one process stores hidden states; run this in one first, then in several")
    about = {**about, "batches": count}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / ABOUT).exists():
            _write(directory / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
        _check_same(directory, about)
        done = _mended(directory / INDEX)
        if done:
            batches.restore(done[-1]["state"])
        made = 0
        for number, step in zip(range(len(done), count), batches, strict=False):
            _store(directory / _name(number), step.batch, np.asarray(states_of(step.batch)))
            line = {"samples": step.samples, "tokens": step.tokens, "state": batches.state()}
            _append(directory / INDEX, json.dumps(line, ensure_ascii=False) + "\n")
            made += 1
        _write(directory / COMPLETE, b"")
    except OSError as error:
        remedy = "what is complete is safe: make room, and run this again"
        raise InputError(f"{directory}: states cannot be stored ({reason_of(error)}); {remedy}") from error
    return made


class StoredBatches:
    """Stored batches as `Batches`, in an order that is drawn for each epoch."""

    def __init__(self, directory: Path, about: dict[str, Any], seed: int = 0, epochs: int | None = None):
        """about: as of `store_states`. epochs: None for no end.

        InputError for states that are missing, incomplete or of something else.
        """
        if not (directory / ABOUT).is_file():
            raise InputError(f"{directory} holds no hidden states; have them stored there first")
        stored = _check_same(directory, about)
        self.directory, self.seed, self.epochs, self.number = directory, seed, epochs, 0
        self.lines = _lines(directory / INDEX)
        if not self.lines or not (directory / COMPLETE).exists():
            held = f"{len(self.lines)} of {stored['batches']} batches"
            raise InputError(f"{directory} holds {held}; let the run that stores them end, by starting it again")

    @property
    def steps(self) -> int | None:
        """The number of batches of all epochs, None where these have no end."""
        return None if self.epochs is None else self.epochs * len(self.lines)

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the batch that comes next."""
        return self.number // len(self.lines)

    def __iter__(self) -> Iterator[Step]:
        """The batches that are left, from the present position on."""
        while self.steps is None or self.number < self.steps:
            epoch, place = divmod(self.number, len(self.lines))
            chosen = int(np.random.default_rng([self.seed, epoch]).permutation(len(self.lines))[place])
            text, states = _read(self.directory / _name(chosen))
            batch = DraftBatch(text, np.asarray(self.number, np.uint32), states)
            self.number += 1
            yield Step(batch, self.lines[chosen]["samples"], self.lines[chosen]["tokens"])

    def state(self) -> dict[str, Any]:
        """The position of the batch that comes next."""
        return {"number": self.number}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.number = int(state["number"])


def _name(number: int) -> str:
    return f"batch-{number:06d}.safetensors"


def _store(file: Path, batch: TextBatch, states: np.ndarray) -> None:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(getattr(batch, name)) for name in ARRAYS}
    _write(file, save({**arrays, "states": np.ascontiguousarray(states)}))


def _read(file: Path) -> tuple[TextBatch, np.ndarray]:
    """The text and the states [B, n, T, D] of a file; arrays are those of the file, not copies."""
    header = read_header(file)
    arrays = {
        name: np.memmap(file, NUMPY_DTYPES[tensor.dtype], "r", tensor.start, tensor.shape)
        for name, tensor in header.items()
    }
    token_ids, labels, first_seen = (arrays[name] for name in ARRAYS)
    # Losses of drafters read no multimodal positions.
    position = (np.arange(first_seen.shape[1]) - first_seen).astype(np.float32)
    text = TextBatch(token_ids, labels, np.broadcast_to(position, (3, *position.shape)), first_seen)
    # By rows, as devices share them.
    return text, np.moveaxis(arrays["states"], 1, 0)


def _write(file: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    part = file.with_name(f".{file.name}.partial")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _append(file: Path, line: str) -> None:
    with file.open("ab") as stream:
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _mended(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, whose last one is cut off if it has no end."""
    if file.exists():
        content = file.read_bytes()
        os.truncate(file, content.rfind(b"\n") + 1)
    return _lines(file)


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [
        parse_json(line, str(file), error=InputError)
        for line in file.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]


def _check_same(directory: Path, about: dict[str, Any]) -> dict[str, Any]:
    stored = read_object(directory / ABOUT, error=InputError, remedy="choose another directory")
    wanted = json.loads(json.dumps(about))
    different = [
        f"{name} {stored.get(name)!r}, not {value!r}" for name, value in wanted.items() if stored.get(name) != value
    ]
    if different:
        raise InputError(f"{directory} holds hidden states of {'; '.join(different)[:400]}; choose another directory")
    return stored
