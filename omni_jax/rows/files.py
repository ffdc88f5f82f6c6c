"""Rows of a dataset as its files hold them: lines of JSON, a JSON list, or a table.

Everything is read within bounds, so that neither a line without an end nor a small file that unpacks to a large one
takes all memory.
"""

import gzip
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from omni_jax.errors import InputError, OmniError
from omni_jax.files import encoding_of, parse_json, read_json, reason_of

LINES = (".jsonl", ".jsonl.gz")
TABLES = (".parquet", ".arrow")
RUN, RESULTS = "run.json", "results-[0-9]*.jsonl"  # what a run writes: what it is, and what came of each sample
MAX_ROW_BYTES = 64_000_000  # of a line, with its media in base64
MAX_LINES = 2_000_000  # of a file, empty ones included; rows of a dataset too
MAX_WHOLE_BYTES = 1_000_000_000  # of a JSON list, which is read at once
MAX_BYTES = 16_000_000_000  # of a file's rows, unpacked
TABLE_ROWS = 64  # that leave a table at once, because each may hold a picture
MAX_DECODED = 200_000_000  # of a Parquet file's rows that are decoded at once


def data_files(path: Path, split: str | None) -> list[Path]:
    """The data files of a path, in order; InputError if there are none.

    split: of a directory, only files whose name is it up to the first "-" or "." after it, or whose folder has its
    name. Of a directory, hidden files and folders are passed over, and the results of runs.
    """
    kinds = (*LINES, ".json", *TABLES)
    if path.is_dir():
        return _of_directory(path, split)
    if not path.exists():
        raise InputError(f"{path} does not exist; name a dataset's file or directory")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file; write its rows into a file and name that")
    if not path.name.endswith(kinds):
        raise InputError(f"{path}: datasets are files of {', '.join(kinds)}, or directories of them")
    return [path]


def _of_directory(path: Path, split: str | None) -> list[Path]:
    found = sorted(file for file in path.rglob("*") if _is_data(file, path))
    parts = {file: (file.relative_to(path).parts[:-1], file.name) for file in found}
    named = re.compile(rf"{re.escape(split or '')}[-.]")
    chosen = [f for f, (folders, name) in parts.items() if split is None or named.match(name) or split in folders]
    if not chosen:
        known = sorted({str(file.relative_to(path)) for file in found})
        raise InputError(f"{path} has no data files{f' of the split {split!r}' if split else ''}; it holds {known[:8]}")
    return chosen


def _is_data(file: Path, root: Path) -> bool:
    """Whether a file within a directory holds rows: no hidden one, and no results of a run that writes there too."""
    if not file.name.endswith((*LINES, *TABLES)) or not file.is_file():
        return False
    if any(part.startswith(".") for part in file.relative_to(root).parts):
        return False
    return not (file.match(RESULTS) and (file.parent / RUN).exists())


def rows_of(files: Iterable[Path]) -> Iterator[tuple[str, Path, Any]]:
    """Where each row is, the folder of its file, and the row; an InputError in place of a row that is no JSON.

    A file is named without its folders, but with as many as it takes to tell it from others of its name.
    """
    files = list(files)
    for file, name in zip(files, _names(files), strict=True):
        with _explained(file, "cannot be read"):
            for number, row in _lines(file) if file.name.endswith(LINES) else enumerate(_whole(file), start=1):
                if number > MAX_LINES:
                    what = "lines" if file.name.endswith(LINES) else "rows"
                    raise InputError(f"{file} has more than {MAX_LINES:,} {what}; split it, and use its parts")
                yield f"{name}:{number}", file.parent, row


def _names(files: Sequence[Path]) -> list[str]:
    parts = {file: Path(os.path.abspath(file)).parts for file in files}
    others = {file: {p for p in parts.values() if p[-1] == parts[file][-1] and p != parts[file]} for file in parts}

    def name(file: Path) -> str:
        own = parts[file]
        counts = range(1, len(own) + 1)
        depth = next(n for n in counts if n == len(own) or all(other[-n:] != own[-n:] for other in others[file]))
        return "/".join(own[-depth:])

    return [name(file) for file in files]


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with _explained(file, "cannot be read"), file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _explained(file: Path, trouble: str) -> Iterator[None]:
    """Whatever the reader of a foreign file raises becomes an InputError that names the file."""
    try:
        yield
    except OmniError:
        raise
    except Exception as error:
        raise InputError(f"{file} {trouble} ({reason_of(error)}); is it complete?") from error


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not empty, up to one that is too many."""
    total = 0
    with _opened(file) as lines:
        for number in range(1, MAX_LINES + 2):
            line = lines.readline(MAX_ROW_BYTES + 1)
            total += len(line)
            if not line:
                return
            _check_row(file, number, len(line))
            _check_total(file, total)
            if line.strip():
                yield number, _parsed(line)
            elif number > MAX_LINES:
                yield number, None


@contextmanager
def _opened(file: Path) -> Iterator[IO[Any]]:
    """The file's lines: bytes in UTF-8, text in another encoding that the first bytes give away."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        encoding = encoding_of(stream.peek(4)[:4])  # type: ignore[attr-defined]
        if encoding.startswith("utf-8"):
            yield stream  # type: ignore[misc]
        else:
            with io.TextIOWrapper(stream, encoding, newline="\n") as text:  # type: ignore[arg-type]
                yield text


def _parsed(line: bytes | str) -> Any:
    try:
        return parse_json(line, "the line", error=InputError)
    except InputError as error:
        return error


def _whole(file: Path) -> Iterable[Any]:
    if file.name.endswith(TABLES):
        return _table(file)
    rows = read_json(file, most=MAX_WHOLE_BYTES, error=InputError)
    if not isinstance(rows, list):
        raise InputError(f"{file} holds a {type(rows).__name__}; give a list of rows, or one row per line as .jsonl")
    return rows


def _table(file: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{file}: reading tables needs pyarrow; pip install 'omni_jax[evaluate]'") from error
    total, number = 0, 0
    with _explained(file, "cannot be read as a table"), pa.memory_map(str(file)) as source:
        for batch in _parquet(file, pq) if file.suffix == ".parquet" else _arrow(pa, source):
            total += batch.nbytes
            _check_total(file, total)
            for start in range(0, batch.num_rows, TABLE_ROWS):
                some = batch.slice(start, TABLE_ROWS)
                if some.nbytes > MAX_ROW_BYTES:
                    for row in range(some.num_rows):
                        _check_row(file, number + row + 1, some.slice(row, 1).nbytes)
                number += some.num_rows
                yield from some.to_pylist()


def _parquet(file: Path, pq: Any) -> Iterator[Any]:
    """The batches of a Parquet file, of as few rows as its metadata call for.

    A value that a dictionary holds once may be that of every row, so a row is bounded by its row group alone.
    """
    table, number = pq.ParquetFile(file), 0
    for index in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(index)
        # Before anything is unpacked: some row is at least as long as the mean.
        _check_row(file, number + 1, group.total_byte_size // max(group.num_rows, 1))
        rows = max(1, min(TABLE_ROWS, MAX_DECODED // max(group.total_byte_size, 1)))
        yield from table.iter_batches(rows, row_groups=[index])
        number += group.num_rows


def _arrow(pa: Any, source: Any) -> Iterator[Any]:
    """The batches of an Arrow file, as a stream (what `save_to_disk` writes) or with an index."""
    try:
        return iter(pa.ipc.open_stream(source))
    except pa.ArrowInvalid:
        source.seek(0)
        table = pa.ipc.open_file(source)
        return (table.get_batch(number) for number in range(table.num_record_batches))


def _check_row(file: Path, number: int, size: int) -> None:
    if size > MAX_ROW_BYTES:
        remedy = "write one row per line, and large media into files of their own"
        raise InputError(f"{file}:{number} is longer than {MAX_ROW_BYTES:,} bytes; {remedy}")


def _check_total(file: Path, total: int) -> None:
    if total > MAX_BYTES:
        raise InputError(f"{file} unpacks to more than {MAX_BYTES:,} bytes; split it, and use its parts")
