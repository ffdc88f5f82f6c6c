"""JSON files and paths that cannot be read, through the one reader that all doors share."""

from pathlib import Path
from typing import Any

from omni_jax.errors import CheckpointError, InputError
from omni_jax.files import read_object, user_path
from tests.bad_inputs.case import Case


def _json(name: str, data: bytes, *words: str, file: str = "a.json") -> Case:
    def act(folder: Path, _: Any) -> None:
        (folder / file).write_bytes(data)
        read_object(folder / file, remedy="copy it again")

    return Case(f"json: {name}", act, (file, *words), CheckpointError)


def _path(name: str, value: Any, *words: str) -> Case:
    return Case(f"path: {name}", lambda *_: user_path(value, "the model"), ("the model", *words), InputError)


CASES = [
    _json("empty", b"", "no valid JSON", "copy it again"),
    _json("a list", b"[1]", "no JSON object", "copy it again"),
    _json("cut short", b'{"a": [1', "no valid JSON"),
    _json("a comma too many", b'{"a": 1,}', "no valid JSON"),
    _json("a name twice", b'{"a": 1, "a": 2}', "'a'", "twice"),
    _json("100,000 brackets", b'{"a":' + b"[" * 100_000, "nested too deep"),
    _json("101 levels", b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested too deep", "100"),
    _json("a number of 5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
    _json("Latin-1", '{"a": "é"}'.encode("latin-1"), "UTF-8"),
    _json("UTF-16 cut within a character", '{"a": 1}'.encode("utf-16")[:-1], "UTF-16"),
    _json("a pickle", b"\x80\x04\x95\x00", "UTF-8"),
    _json("gzip that is none", b"{}", "damaged", file="a.json.gz"),
    Case("json: a folder", lambda folder, _: read_object(folder), ("not a regular file",), CheckpointError),
    Case("json: an endless device", lambda *_: read_object(Path("/dev/zero")), ("not a regular file",)),
    Case("json: missing", lambda folder, _: read_object(folder / "a.json", remedy="copy it"), ("copy it",)),
    Case("json: a name too long", lambda folder, _: read_object(folder / ("a" * 300)), ("cannot be read", "name too")),
    _path("None", None, "NoneType"),
    _path("a number", 4, "int"),
    _path("bytes", b"ckpt", "bytes"),
    _path("empty", "", "empty"),
    _path("a null character", "a\0b", "null character"),
    _path("a stranger's home", "~nobody-of-this-name/a", "home directory"),
]
