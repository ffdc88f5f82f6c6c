"""Untrusted files: paths as users type them, and bytes, text and JSON within limits.

All text and JSON that the project reads comes through here, so that a missing file, a pipe, an endless device, a wrong
encoding, a number of a thousand digits or a hundred thousand brackets give one sentence that names the file and the
remedy. Byte-order marks, UTF-16 and UTF-32 are read. The caller checks what the JSON means (configurations: `reader`).
"""

import codecs
import gzip
import json
import os
import re
import stat
import sys
import zlib
from pathlib import Path
from typing import Any

from omni_jax.errors import CheckpointError, InputError, OmniError

MAX_JSON_BYTES = 64_000_000
MAX_DEPTH = 100  # nested lists and objects; far more than any real configuration or conversation has
MAX_DIGITS = 320  # of one number; a float64 has at most 309 before the point
STDIN = "-"

# Byte-order marks. UTF-32 comes first, because its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# JSON begins with two ASCII characters, so zeros between them show the encoding of a file without a mark.
_ZEROS = ((b"\0\0\0", "utf-32-be"), (b"\0", "utf-16-be"))


def user_path(value: Any, what: str) -> Path:
    """The path that a user gave as text or path object, with `~` expanded; else InputError, which names `what`."""
    if not isinstance(value, str | os.PathLike) or isinstance(text := os.fspath(value), bytes):
        raise InputError(f"{what} is of type {type(value).__name__}; give a path")
    if not text:
        raise InputError(f"{what} is an empty path; name a file or directory")
    if "\0" in text:
        raise InputError(f"{what} {text[:80]!r} holds a null character; no path does")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise InputError(f"{what} {text[:80]!r} holds half a character; no path does") from None
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{what} {text[:80]!r}: there is no such home directory; write the path out") from None


def reason_of(error: BaseException) -> str:
    """Why an operation failed, in words, without error numbers and addresses of objects."""
    if said := getattr(error, "strerror", None):  # of OSError, and of FFmpeg's errors
        return str(said).lower()
    said = re.sub(r"<[^<>]* at 0x[0-9a-f]+>|<_io\.[^<>]*>", "the file", str(error))
    said = re.sub(r"( at)? 0x[0-9a-f]{6,}", "", said, flags=re.I).strip().splitlines()
    return said[0][:200] if said else type(error).__name__


def read_bytes(
    path: Path, *, most: int = MAX_JSON_BYTES, error: type[OmniError] = CheckpointError, remedy: str = ""
) -> bytes:
    """The bytes of a regular file of at most `most` bytes, decompressed if its name ends in .gz.

    Raises `error`, which names the file, if it cannot be read. remedy: what a user should do about a file that is
    missing or damaged. Path("-") is standard input if `error` is InputError.
    """
    remedy = f"; {remedy}" if remedy else ""
    if _is_stdin(path, error):
        if sys.stdin is None:
            raise error("standard input is closed; name a file")
        return _bounded(sys.stdin.buffer.read(most + 1), "standard input", most, error)
    try:
        # Non-blocking, so that opening a pipe without a writer does not wait; pipes are refused below.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise error(f"{path}: not a regular file{remedy}")
        with os.fdopen(descriptor, "rb") as file, gzip.open(file) if path.suffix == ".gz" else file as stream:
            return _bounded(stream.read(most + 1), str(path), most, error)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file{remedy}") from None
    except PermissionError:
        raise error(f"{path}: cannot be read (permission denied); ask its owner to let you read it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as damage:
        raise error(f"{path}: damaged ({reason_of(damage)}){remedy}") from None
    except OSError as failure:
        raise error(f"{path}: cannot be read ({reason_of(failure)}){remedy}") from None


def _is_stdin(path: Path, error: type[OmniError]) -> bool:
    return str(path) == STDIN and issubclass(error, InputError)


def read_text(
    path: Path, *, most: int = MAX_JSON_BYTES, error: type[OmniError] = CheckpointError, remedy: str = ""
) -> str:
    """The text of a file, read as `read_bytes` does: UTF-8, or UTF-16 or UTF-32 if its first bytes show that."""
    return decode_text(read_bytes(path, most=most, error=error, remedy=remedy), str(path), error=error)


def read_json(
    path: Path, *, most: int = MAX_JSON_BYTES, error: type[OmniError] = CheckpointError, remedy: str = ""
) -> Any:
    """The value of a JSON file; arguments and errors as in `read_bytes` and `parse_json`."""
    where = "standard input" if _is_stdin(path, error) else str(path)
    return parse_json(read_bytes(path, most=most, error=error, remedy=remedy), where, error=error, remedy=remedy)


def read_object(
    path: Path, *, most: int = MAX_JSON_BYTES, error: type[OmniError] = CheckpointError, remedy: str = ""
) -> dict[str, Any]:
    """The value of a JSON file that must be an object of names and values; arguments and errors as in `read_json`."""
    values = read_json(path, most=most, error=error, remedy=remedy)
    if not isinstance(values, dict):
        raise error(f"{path}: holds no JSON object of names and values{f'; {remedy}' if remedy else ''}")
    return values


def parse_json(data: bytes | str, where: str, *, error: type[OmniError] = CheckpointError, remedy: str = "") -> Any:
    """The value of a JSON text; raises `error` if it is invalid, is nested too deep, or repeats a name.

    NaN and Infinity, which Python writes, are read; the caller checks the ranges of numbers.
    """
    remedy = f"; {remedy}" if remedy else ""
    text = decode_text(data, where, error=error) if isinstance(data, bytes) else data

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen = set[str]()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise error(f"{where}: the name {twice[:80]!r} occurs twice in one object{remedy}")
        return values

    def short(number: str) -> int:
        if len(number) > MAX_DIGITS:
            raise error(f"{where}: holds a number of {len(number)} digits, which nothing here can need{remedy}")
        return int(number)

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_int=short)
    except RecursionError:
        raise error(f"{where}: nested too deep; at most {MAX_DEPTH} levels are read{remedy}") from None
    except ValueError as wrong:
        if isinstance(wrong, OmniError):
            raise
        raise error(f"{where}: no valid JSON ({reason_of(wrong)}){remedy}") from None
    if depth_of(value) > MAX_DEPTH:
        raise error(f"{where}: nested too deep; at most {MAX_DEPTH} levels are read{remedy}")
    return value


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there as a whole or, where this is interrupted, as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        part.write_text(content, "utf-8", "backslashreplace") if isinstance(content, str) else part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def lock(descriptor: int, path: Path) -> None:
    """Keep other runs from writing a file that is open, where the file system knows locks; InputError if one does."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{path} is being written by another run; wait for it, or choose another directory") from error
    except OSError:
        return


def depth_of(value: Any) -> int:
    """How deep lists and dicts are nested; counted without recursion, up to one more than MAX_DEPTH."""
    depth, level = 0, [value]
    while (level := [v for v in level if isinstance(v, dict | list | tuple)]) and depth <= MAX_DEPTH:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def decode_text(data: bytes, where: str, *, error: type[OmniError] = CheckpointError) -> str:
    """The text of bytes in UTF-8, UTF-16 or UTF-32, without its byte-order mark."""
    encoding = encoding_of(data[:4])
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as wrong:
        raise error(
            f"{where}: byte {wrong.start} cannot be read as {encoding.upper()}; save the file as UTF-8"
        ) from None


def encoding_of(head: bytes) -> str:
    """Python's name of the encoding of a text with these first four bytes; without a mark it must be JSON."""
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if encoding is None:
        encoding = next((name for zeros, name in _ZEROS if head.startswith(zeros)), "utf-8")
    if encoding == "utf-8" and head[1:2] == b"\0":
        encoding = "utf-32-le" if head[2:4] == b"\0\0" else "utf-16-le"
    return encoding


def _bounded(data: bytes, where: str, most: int, error: type[OmniError]) -> bytes:
    if len(data) > most:
        raise error(f"{where}: more than {most:,} bytes; this is too large for a file of its kind")
    if data.startswith(b"version https://git-lfs"):
        raise error(f"{where}: a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    return data
