"""Rows of training data, as `omni-jax train` reads them, and how a sense's rows are made: each by its number alone.

    Sense.make(draw, split) -> Sample (messages, answer, media) -> media files -> a line of rows/<sense>.<split>.jsonl

Splits differ in voices, collections, fonts, wordings and combinations, which each sense states. Row i does not depend
on how many rows are made. The file of rows is written last, so a sense whose file is there is complete.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from scripts.nano.origin import check_origin, digest_of

Split = Literal["train", "test"]
Need = Literal["voices", "handwriting"]
SPLITS: tuple[Split, ...] = ("train", "test")
# Rows that a worker makes at a time.
SHARE = 64


@dataclass(frozen=True)
class Sample:
    """A conversation whose last message is the model's.

    media: what its parts name, by file name: the bytes of each file. answer: the words that are looked for in a reply,
    where it is judged by them; other replies are compared with the last message.
    """

    messages: list[dict[str, Any]]
    answer: str
    media: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Sense:
    """What is asked, and how a row of it is made from random numbers and the split.

    counts: rows by split. needs: what is made or fetched before its rows.
    """

    name: str
    make: Callable[[np.random.Generator, Split], Sample]
    counts: dict[Split, int]
    needs: tuple[Need, ...] = ()


def counts(scale: float, train: int, test: int) -> dict[Split, int]:
    """Rows of a sense by split, scaled."""
    return {"train": max(1, round(train * scale)), "test": max(1, round(test * scale))}


def user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    """A message of the user: text, and parts of media."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    """A message of the model."""
    return {"role": "assistant", "content": text}


def pick(draw: np.random.Generator, choices: Sequence[Any]) -> Any:
    """One of several."""
    return choices[int(draw.integers(len(choices)))]


def write_sense(directory: Path, sense: Sense, seed: int, workers: int) -> None:
    """Make the rows of a sense that are not there yet, in `directory`.

    InputError if there are more or fewer, or if they were drawn from another seed.
    """
    check_origin(directory, f"rows-{sense.name}", [rows_path(directory, sense.name, s) for s in SPLITS], {"seed": seed})
    for split in SPLITS:
        path = rows_path(directory, sense.name, split)
        if path.exists():
            if (held := rows_there(directory, sense.name, split)) != sense.counts[split]:
                raise InputError(
                    f"{path} holds {held:,} rows, not {sense.counts[split]:,}; delete it, or give the --scale of before"
                )
            continue
        (directory / "media" / sense.name / split).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        share = partial(_share, directory, sense, split, seed, sense.counts[split])
        begins = range(0, sense.counts[split], SHARE)
        lines = [line for part in _each(share, begins, workers) for line in part]
        write_whole(path, "".join(line + "\n" for line in lines))


def rows_path(directory: Path, sense: str, split: Split) -> Path:
    """Where the rows of a sense are."""
    return directory / "rows" / f"{sense}.{split}.jsonl"


def rows_there(directory: Path, sense: str, split: Split) -> int:
    """The number of rows of a sense that were made."""
    return rows_path(directory, sense, split).read_bytes().count(b"\n")


def made_senses(directory: Path, split: Split) -> list[str]:
    """The senses whose rows of a split were made, sorted."""
    return sorted(file.name.split(".")[0] for file in directory.glob(f"rows/*.{split}.jsonl"))


def rows_digest(directory: Path, senses: Iterable[str] | None = None) -> str:
    """A digest of the training rows of some senses, or of all that have some; InputError for one that has none."""
    known = made_senses(directory, "train")
    senses = known if senses is None else list(senses)
    if unknown := [sense for sense in senses if sense not in known]:
        raise InputError(f"{rows_path(directory, unknown[0], 'train')} is missing; run the stage data first")
    return digest_of(rows_path(directory, sense, "train") for sense in senses)


def samples(sense: Sense, split: Split, seed: int, begin: int = 0) -> Iterator[Sample]:
    """The samples of a sense from number `begin` on, without end."""
    index = begin
    while True:
        yield sense.make(np.random.default_rng([seed, crc32(f"{sense.name}.{split}".encode()), index]), split)
        index += 1


def _each(share: Callable[[int], list[str]], begins: range, workers: int) -> Iterator[list[str]]:
    if workers <= 1:
        yield from map(share, begins)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(share, begins)


def _share(directory: Path, sense: Sense, split: Split, seed: int, count: int, begin: int) -> list[str]:
    """Write the media of some rows: their lines."""
    number = min(SHARE, count - begin)
    made = islice(samples(sense, split, seed, begin), number)
    return [_line(directory, sense.name, split, begin + i, sample) for i, sample in enumerate(made)]


def _line(directory: Path, sense: str, split: Split, index: int, sample: Sample) -> str:
    folder = Path("media") / sense / split
    for name, content in sample.media.items():
        write_whole(directory / folder / f"{index:06d}-{name}", content)

    # Rows lie in a folder beside that of the media.
    row = row_of(sample, f"{sense}.{split}.{index}", sense, f"../{folder}/{index:06d}-")
    return json.dumps(row, ensure_ascii=False)


def row_of(sample: Sample, name: str, sense: str, place: str) -> dict[str, Any]:
    """The row of a sample; place: what precedes the names of its media."""

    def placed(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["type"]
        return part if kind == "text" else {**part, kind: f"{place}{part[kind]}"}

    def message(one: dict[str, Any]) -> dict[str, Any]:
        content = one["content"]
        return one if isinstance(content, str) else {**one, "content": [placed(part) for part in content]}

    messages = [message(one) for one in sample.messages]
    return {"id": name, "messages": messages, "sense": sense, "answer": sample.answer}
