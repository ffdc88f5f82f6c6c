"""Datasets: rows of messages with references, from a file or from a directory in Hugging Face's layout.

A row is a JSON object (or a row of a Parquet or Arrow table) with

    messages | prompt | turns    a conversation, one question, or questions asked one after the other
    system, image, audio, video  with a prompt or turns: what comes before the first question; media one or a list
    reference(s)                 the right answer, or several; with turns, `reference` as a list holds one for each,
                                 and `references` several for the last
    choices, answer              what to choose from, and which is right: its number, its letter or itself
    id | question_id, category   a name, by default "#" and the row's number from 0, and a group for the report

Other columns are not read; one that seems to be misnamed ("images", "refrence") is its row's problem.

Paths of media are relative to the file that names them, in every form of a part; tables may hold media themselves, as
{"bytes", "path"}. A row that cannot be used is a `Problem` that says where it is; the others are read.
"""

import string
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from omni_jax.errors import InputError
from omni_jax.evaluate.media import Library
from omni_jax.files import user_path
from omni_jax.inputs.messages import KINDS
from omni_jax.rows.columns import Columns
from omni_jax.rows.files import MAX_LINES, data_files, digest_of, rows_of
from omni_jax.rows.row import Problem, plain_row, reason

FORMS = ("messages", "prompt", "turns")
COLUMNS = Columns(
    groups=(FORMS, ("reference", "references")),
    media={kind: kind for kind in KINDS},
    others=("system", "choices"),
    free=("answer", "id", "question_id", "category"),
)
SHOWN_AFTER = 1.0  # seconds of reading
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Sample:
    """One row. messages: up to the first question. turns: further questions. answer: index of the right choice.

    media: a digest of the files that the messages name, "" without.
    """

    id: str
    messages: list[dict[str, Any]]
    turns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: int | None = None
    category: str = ""
    media: str = ""


@dataclass(frozen=True, eq=False)
class Dataset:
    """What was read. digest: of the files' bytes, in hexadecimal. unread: names of columns that are not read."""

    samples: list[Sample]
    problems: list[Problem]
    digest: str
    unread: tuple[str, ...] = ()


def read_dataset(path: str | Path, *, split: str | None = None, limit: int | None = None) -> Dataset:
    """Read a file (.jsonl, .jsonl.gz, .json, .parquet, .arrow) or a directory of them.

    split: as in `data_files`. limit: rows that are read. All files of media that the rows name are read too.
    InputError if there is no such file, or no row that can be used.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; read at least one row")
    files = data_files(user_path(path, "the dataset"), split)
    samples, problems, names, unread, library = [], [], set[str](), set[str](), Library()
    for number, (where, folder, row) in enumerate(_with_progress(islice(rows_of(files), limit))):
        if number == MAX_LINES:
            raise InputError(f"{path} has more than {MAX_LINES:,} rows; evaluate its files or splits one by one")
        try:
            sample = read_row(row, folder, f"#{number}", library, unread)
            if sample.id in names:
                raise InputError(f"the id {sample.id!r} was used before")
        except Exception as error:
            problems.append(Problem(where, reason(error)))
            continue
        names.add(sample.id)
        samples.append(sample)
    if not samples:
        why = f"; the first of {len(problems)}: {problems[0].where}: {problems[0].why}" if problems else ""
        raise InputError(f"{path} has no row that can be used{why}")
    return Dataset(samples, problems, digest_of(files), tuple(sorted(unread)))


def _with_progress(rows: Iterable[T]) -> Iterable[T]:
    """The rows, with a count of them on stderr where it is a terminal and their media take a while to read."""
    return tqdm(rows, "reading", unit="row", leave=False, file=sys.stderr, disable=None, delay=SHOWN_AFTER)


def read_row(row: Any, folder: Path, name: str, library: Library, unread: set[str]) -> Sample:
    """A sample from a row, with paths of media relative to `folder`.

    name: its id if it states none. unread: the names of columns that are not read are added to it.
    """
    row = plain_row(row)
    unread |= COLUMNS.check(row)
    messages, turns = _conversation(row)
    messages, media = library.locate(messages, folder)
    choices = _strings(row, "choices", several=True)
    references = _strings(row, "references") or _reference(row, turns)
    name, category = str(row.get("id", row.get("question_id", name))), str(row.get("category", ""))
    return Sample(name, messages, turns, references, choices, _answer(row, choices), category, media)


def _conversation(row: dict[str, Any]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The messages up to the first question, and the questions after it."""
    forms = [form for form in FORMS if form in row]
    if len(forms) != 1:
        raise InputError(f"the row has {forms or 'no question'}; give one of 'messages', 'prompt' and 'turns'")
    if forms == ["messages"]:
        extra = [key for key in ("system", *KINDS) if key in row]
        if extra:
            raise InputError(f"{extra[0]!r} is beside 'messages'; put it into them")
        return _list(row["messages"], "messages"), ()
    if isinstance(row.get("prompt"), list):
        raise InputError("'prompt' is a list; give 'turns' for questions one after the other")
    first, *turns = _strings(row, forms[0], several=forms == ["turns"]) or ("",)
    if not first:
        raise InputError(f"{forms[0]!r} is empty")
    media = [{"type": kind, kind: source} for kind in KINDS for source in _one_or_more(row.get(kind))]
    content = [*media, {"type": "text", "text": first}] if media else first
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    return [*system, {"role": "user", "content": content}], tuple(turns)


def _reference(row: dict[str, Any], turns: tuple[str, ...]) -> tuple[str, ...]:
    """The right answers to the last question; with several turns, a list holds one for each, as in FastChat."""
    references = _strings(row, "reference")
    if not turns or not isinstance(row.get("reference"), list):
        return references
    if len(references) != 1 + len(turns):
        raise InputError(f"'reference' is a list of {len(references)} for {1 + len(turns)} turns; give one for each")
    # An empty one is none: some of FastChat's second turns have no right answer.
    return references[-1:] if references[-1] else ()


def _answer(row: dict[str, Any], choices: tuple[str, ...]) -> int | None:
    """The index of the right choice. A text is a choice, else a letter or a number; a number must fit one choice."""
    answer = row.get("answer")
    if not choices or answer is None:
        return None
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        marks = dict(zip(string.ascii_uppercase, range(len(choices)), strict=False))
        marks |= {str(i): i for i in range(len(choices))}
        if answer.strip().upper() in marks:
            return marks[answer.strip().upper()]
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        # Its number, or itself among choices that are numbers; digits in quotes are text.
        meant = [i for i, choice in enumerate(row["choices"]) if answer in (i, choice)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise InputError(f"'answer' is {answer}, which fits several choices; give a letter")
    raise InputError(f"'answer' is {answer!r}; give a choice, its letter, or its number from 0")


def _strings(row: dict[str, Any], key: str, several: bool = False) -> tuple[str, ...]:
    """The string or strings of a field, none if it is absent; numbers count as written."""
    if several and key in row and not isinstance(row[key], list):
        raise InputError(f"{key!r} is of type {type(row[key]).__name__}; give a list")
    values = _one_or_more(row.get(key))
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(f"{key!r} holds a {type(value).__name__}; give text")
    return tuple(str(value) for value in values)


def _one_or_more(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{key!r} is of type {type(value).__name__}; give a list")
    return value
