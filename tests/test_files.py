"""Paths, bounded reading and JSON, of files as people and programs write them."""

import codecs
import gzip
import json
import os
import sys
import time
from pathlib import Path

import pytest

from omni_jax.errors import CheckpointError, InputError
from omni_jax.files import MAX_DEPTH, decode_text, depth_of, parse_json, read_bytes, read_json, read_object, user_path

TEXT = '{"é": [1, 2.5, "ü"]}'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_json_is_read_in_every_encoding_that_editors_write(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(TEXT.encode(encoding))
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, "ü"]}


def test_text_keeps_what_is_no_mark() -> None:
    assert decode_text(codecs.BOM_UTF8 + "a\ufeffb".encode(), "x") == "a\ufeffb"
    assert decode_text(b"", "x") == "" and decode_text(b"a", "x") == "a"


def test_gzip_is_unpacked_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b" " * 5000 + b"7"))
    assert read_json(path, most=5001) == 7
    with pytest.raises(CheckpointError, match="more than 5,000 bytes"):
        read_json(path, most=5000)
    path.write_bytes(gzip.compress(b"7")[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        read_json(path)


def test_depth_is_bounded_at_any_size() -> None:
    assert depth_of(7) == 0 and depth_of([{"a": (1,)}]) == 3
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert depth_of(parse_json(deep, "x")) == MAX_DEPTH
    for brackets in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(CheckpointError, match="x: nested too deep; at most 100 levels"):
            parse_json("[" * brackets + "]" * brackets, "x")


def test_numbers_and_names_are_bounded() -> None:
    assert parse_json("1" + "0" * 300, "x") == 10**300
    with pytest.raises(CheckpointError, match="400 digits"):
        parse_json("1" * 400, "x")
    with pytest.raises(InputError, match="'a' occurs twice"):
        parse_json('{"b": 1, "a": 1, "a": 2}', "x", error=InputError)


def test_many_names_are_quickly_compared() -> None:
    names = ", ".join(f'"{i}": 1' for i in range(30_000))
    start = time.process_time()
    with pytest.raises(InputError, match="'29999' occurs twice"):
        parse_json(f'{{{names}, "29999": 1}}', "x", error=InputError)
    assert time.process_time() - start < 2


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file; take another"):
            read_bytes(path, error=InputError, remedy="take another")
    with pytest.raises(CheckpointError, match="no such file; copy it"):
        read_bytes(tmp_path / "none", remedy="copy it")


def test_an_object_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"no JSON object of names and values; copy it"):
        read_object(tmp_path / "a.json", remedy="copy it")
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"byte 7 cannot be read as UTF-8; save the file as UTF-8"):
        read_object(tmp_path / "a.json")


def test_paths_are_what_users_type() -> None:
    assert user_path("~/a", "file") == Path.home() / "a"
    assert user_path(Path("a b"), "file") == Path("a b")
    for wrong, words in ((None, "NoneType"), (7, "int"), (b"a", "bytes"), ("", "empty"), ("a\0b", "null character")):
        with pytest.raises(InputError, match=words):
            user_path(wrong, "file")
    with pytest.raises(InputError, match="no such home directory"):
        user_path("~nobody-of-this-name/a", "file")


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed; name a file"):
        read_bytes(Path("-"), error=InputError)
