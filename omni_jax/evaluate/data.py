"""Datasets: rows of messages with references, from a file or from a directory in Hugging Face's layout.

A row is a JSON object (or a row of a Parquet or Arrow table) with

    messages | prompt | turns    a conversation, one question, or questions said one after the other
    system, image, audio, video  beside a prompt or turns: what stands before the first question; media one or a list
    reference(s)                 the right answer, or several; beside turns, `reference` as a list holds one for each,
                                 and `references` several for the last
    choices, answer              what to choose from, and which is right: its number, its letter or itself
    id | question_id, category   a name, by default "#" and the row's number from 0, and a group for the report

Paths of media are relative to the file that names them; tables may hold media themselves, as {"bytes", "path"}. A row
that cannot be used is a `Problem` that says where it stands; the others are read.
"""

import gzip
import hashlib
import json
import re
import string
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.inputs.messages import KINDS, read_conversation

LINES = (".jsonl", ".jsonl.gz")
TABLES = (".parquet", ".arrow")


@dataclass(frozen=True, eq=False)
class Sample:
    """One row. messages: up to the first question. turns: further questions. answer: index of the right choice."""

    id: str
    messages: list[dict[str, Any]]
    turns: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answer: int | None = None
    category: str = ""


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: where it stands ("file:line"), and why."""

    where: str
    why: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """What was read. digest: of the files' bytes, in hexadecimal."""

    samples: list[Sample]
    problems: list[Problem]
    digest: str


def read_dataset(path: str | Path, *, split: str | None = None, limit: int | None = None) -> Dataset:
    """Read a file (.jsonl, .jsonl.gz, .json, .parquet, .arrow) or a directory of them.

    split: of a directory, only files whose name is it up to the first "-" or "." behind, or whose folder has its name.
    limit: rows that are read.
    InputError if there is no such file, or no row that can be used.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; read at least one row")
    files = _files(Path(path), split)
    samples, problems, names = [], [], set[str]()
    for number, (where, folder, row) in enumerate(islice(_rows(files), limit)):
        try:
            sample = read_row(row, folder, f"#{number}")
            if sample.id in names:
                raise InputError(f"the id {sample.id!r} was used before")
        except InputError as error:
            problems.append(Problem(where, str(error)))
            continue
        names.add(sample.id)
        samples.append(sample)
    if not samples:
        why = f"; the first of {len(problems)}: {problems[0].where}: {problems[0].why}" if problems else ""
        raise InputError(f"{path} has no row that can be used{why}")
    return Dataset(samples, problems, digest_of(files))


def read_row(row: Any, folder: Path, name: str) -> Sample:
    """A sample from a row, whose media lie relative to `folder`; `name`: its id if it states none."""
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"the row is of type {type(row).__name__}; write a JSON object")
    try:
        row = _plain(row)
    except RecursionError as error:
        raise InputError("the row is nested too deeply") from error
    messages, turns = _conversation(row, folder)
    read_conversation(messages)
    choices = _strings(row, "choices", several=True)
    references = _strings(row, "references") or _reference(row, turns)
    given = row.get("id", row.get("question_id", name))
    return Sample(str(given), messages, turns, references, choices, _answer(row, choices), str(row.get("category", "")))


def _conversation(row: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The messages up to the first question, and the questions behind it."""
    forms = [form for form in ("messages", "prompt", "turns") if form in row]
    if len(forms) != 1:
        raise InputError(f"the row has {forms or 'no question'}; give one of 'messages', 'prompt' and 'turns'")
    if forms == ["messages"]:
        extra = [key for key in ("system", *KINDS) if key in row]
        if extra:
            raise InputError(f"{extra[0]!r} stands beside 'messages'; put it into them")
        return [_with_media(message, folder) for message in _list(row["messages"], "messages")], ()
    if isinstance(row.get("prompt"), list):
        raise InputError("'prompt' is a list; give 'turns' for questions one after the other")
    first, *turns = _strings(row, forms[0], several=forms == ["turns"]) or ("",)
    if not first:
        raise InputError(f"{forms[0]!r} is empty")
    media = [{"type": kind, kind: source} for kind in KINDS for source in _one_or_more(row.get(kind))]
    content = [*media, {"type": "text", "text": first}] if media else first
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    return [*system, _with_media({"role": "user", "content": content}, folder)], tuple(turns)


def _with_media(message: Any, folder: Path) -> Any:
    """A message whose media are found from anywhere."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_found(part, folder) for part in message["content"]]}


def _found(part: Any, folder: Path) -> Any:
    if not isinstance(part, dict) or part.get("type") not in KINDS:
        return part
    key = next((key for key in (part["type"], "path", "url") if key in part), None)
    source = part.get(key) if key else None
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, str):
        return part if source is None else {**part, key: source}
    if ":" in source[2:]:  # data: and file: URLs; the colon of C:\clip.mp4 comes before
        return part
    path = folder / source
    try:
        there = path.is_file()
    except OSError as error:
        remedy = "write base64 as data:image/png;base64,..."
        raise InputError(f"{source[:40]!r}... is no path ({error.strerror}); {remedy}") from error
    if not there:
        raise InputError(f"{path} does not exist; paths of media are relative to the dataset's file")
    return {**part, key: str(path)}


def _reference(row: dict[str, Any], turns: tuple[str, ...]) -> tuple[str, ...]:
    """The right answers to the last question; a list beside several turns holds one for each, as FastChat's do."""
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
        # Its number, or itself among choices that are numbers; digits in quotes are none.
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


def _plain(value: Any) -> Any:
    """A value without null, with which tables fill absent fields; InputError for text that cannot be written again."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{value[:40]!r} is no text: it holds half of a surrogate pair") from error
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _files(path: Path, split: str | None) -> list[Path]:
    """The data files of a path, in order."""
    kinds = (*LINES, ".json", *TABLES)
    if path.is_file():
        if not path.name.endswith(kinds):
            raise InputError(f"{path}: datasets are files of {', '.join(kinds)}, or directories of them")
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; name a dataset's file or directory")
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith((*LINES, *TABLES)))
    parts = {file: (file.relative_to(path).parts[:-1], file.name) for file in found}
    named = re.compile(rf"{re.escape(split or '')}[-.]")
    chosen = [f for f, (folders, name) in parts.items() if split is None or named.match(name) or split in folders]
    if not chosen:
        known = sorted({str(file.relative_to(path)) for file in found})
        raise InputError(f"{path} has no data files{f' of the split {split!r}' if split else ''}; it holds {known[:8]}")
    return chosen


def _rows(files: Iterable[Path]) -> Iterator[tuple[str, Path, Any]]:
    """Where each row stands, the folder of its file, and the row; an InputError in place of a row that is no JSON."""
    for file in files:
        try:
            for number, row in _lines(file) if file.name.endswith(LINES) else enumerate(_whole(file), start=1):
                yield f"{file.name}:{number}", file.parent, row
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{file} cannot be read ({error}); is it complete?") from error


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, InputError(f"the line is no JSON ({error})")


def _whole(file: Path) -> Iterable[Any]:
    if file.name.endswith(TABLES):
        return _table(file)
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error})") from error
    return _list(rows, str(file))


def _table(file: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{file}: reading tables needs pyarrow; pip install 'omni_jax[evaluate]'") from error
    try:
        if file.suffix == ".parquet":
            batches = pq.ParquetFile(file).iter_batches()
        else:
            with pa.memory_map(str(file)) as source:
                batches = _arrow(pa, source)
        for batch in batches:
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{file} cannot be read as a table ({error})") from error


def _arrow(pa: Any, source: Any) -> list[Any]:
    """The batches of an Arrow file, as a stream (what `save_to_disk` writes) or with an index."""
    try:
        return list(pa.ipc.open_stream(source))
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all().to_batches()


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()
