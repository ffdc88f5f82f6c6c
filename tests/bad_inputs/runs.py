"""Datasets, settings and folders with which no evaluation can run; all is said before weights are read."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.evaluate.command import Evaluate, evaluate
from omni_jax.evaluate.data import read_dataset
from omni_jax.evaluate.run import claim_directory
from omni_jax.omni import Omni
from tests.bad_inputs.case import Case
from tests.helpers.flags import command

ROW = {"prompt": "Hi", "reference": "x"}


def _unread(parts: tuple[str, ...] | None) -> Omni:
    raise AssertionError("the weights are read")


def _file(name: str, make: Callable[[Path], Any], *words: str, file: str = "rows.jsonl") -> Case:
    def act(folder: Path, _: Any) -> None:
        make(folder / file)
        read_dataset(folder / file)

    return Case(f"dataset: {name}", act, words, InputError)


def _bytes(name: str, data: bytes, *words: str, file: str = "rows.jsonl") -> Case:
    return _file(name, lambda path: path.write_bytes(data), *words, file=file)


def _row(name: str, row: Any, *words: str) -> Case:
    return _bytes(f"row: {name}", json.dumps(row).encode() + b"\n", "rows.jsonl:1", *words)


def _medium(name: str, make: Callable[[Path], Any], *words: str, kind: str = "image") -> Case:
    def act(folder: Path, _: Any) -> None:
        make(folder / "a.bin")
        (folder / "rows.jsonl").write_text(json.dumps({"prompt": "?", kind: "a.bin"}) + "\n")
        read_dataset(folder / "rows.jsonl")

    return Case(f"dataset's medium: {name}", act, ("rows.jsonl:1", "a.bin", *words), InputError)


def _command(name: str, *words: str, row: dict = ROW, **settings: Any) -> Case:
    def act(folder: Path, world: Any) -> None:
        _evaluate(folder, world, row, settings)

    return Case(f"evaluate: {name}", act, words, InputError)


def _output(name: str, make: Callable[[Path], Any], *words: str) -> Case:
    def act(folder: Path, _: Any) -> None:
        (folder / "run.json").write_text("{}")
        make(folder)
        claim_directory(folder, {})

    return Case(f"results: {name}", act, words, InputError)


def _held(name: str, line: str, *words: str) -> Case:
    words = ("results-00000.jsonl:1 is damaged", "remove the line", *words)
    return _output(name, lambda folder: (folder / "results-00000.jsonl").write_text(line + "\n"), *words)


def _evaluate(folder: Path, world: Any, row: dict, settings: dict) -> None:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    paths: dict[str, Any] = {"model": world.converted, "data": folder / "rows.jsonl", "output": folder / "out"}
    evaluate(command(Evaluate, **paths | settings), _unread)


def _sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def raising(wave: Any, rate: int) -> str:
    raise RuntimeError("no GPU <Device object at 0x7f00aa00bb>")


def silent(wave: Any, rate: int) -> None:
    return None


SPEECH = {"task": "speech", "max_new_tokens": 4}
HERE = __name__

CASES = [
    _bytes("no JSON", b"{prompt: 1}\n", "rows.jsonl:1", "no valid JSON"),
    _bytes("100,000 brackets", b'{"prompt": ' + b"[" * 100_000 + b"\n", "rows.jsonl:1", "nested too deep"),
    _bytes("a number of 5,000 digits", b'{"prompt": ' + b"9" * 5000 + b"}\n", "5000 digits"),
    _bytes("a name twice", b'{"prompt": "a", "prompt": "b"}\n', "'prompt'", "twice"),
    _bytes("Latin-1", '{"prompt": "é"}\n'.encode("latin-1"), "UTF-8"),
    _bytes("UTF-16 cut within a character", '{"prompt": "a"}\n'.encode("utf-16")[:-1], "rows.jsonl", "complete"),
    _bytes("empty", b"", "no row that can be used"),
    _bytes("a pickle", b"\x80\x04\x95\n", "rows.jsonl:1"),
    _file("a line of 10 GB", _sparse(10**10), "rows.jsonl:1", "64,000,000 bytes", "one row per line"),
    _bytes("a packed line of 65 MB", gzip.compress(b"a" * 65_000_000, 1), "longer than", file="rows.jsonl.gz"),
    _bytes("gzip that is none", b'{"prompt": "a"}\n', "rows.jsonl.gz", "complete", file="rows.jsonl.gz"),
    _bytes("gzip cut short", gzip.compress(b'{"prompt": "a"}\n')[:-9], "complete", file="rows.jsonl.gz"),
    _file("a JSON list of 10 GB", _sparse(10**10), "rows.json", "more than", file="rows.json"),
    _bytes("JSON that is no list", b"{}", "rows.json", "give a list", file="rows.json"),
    _bytes("a damaged table", b"PAR1 and more", "cannot be read as a table", file="rows.parquet"),
    _bytes("a damaged Arrow file", b"ARROW1", "cannot be read as a table", file="rows.arrow"),
    _bytes("a table of nothing", b"", "cannot be read as a table", file="rows.parquet"),
    _bytes("another kind of file", b"a,b\n", "rows.csv", ".jsonl", file="rows.csv"),
    _file("a pipe", os.mkfifo, "not a regular file"),
    _file("an endless device", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    _file("a dangling link", lambda path: path.symlink_to("nowhere"), "does not exist"),
    _file("a folder without data", lambda path: path.mkdir(), "no data files"),
    _file("a folder whose data are pipes", lambda p: (p.mkdir(), os.mkfifo(p / "a.jsonl")), "no data files"),
    Case("dataset: a number as its path", lambda *_: read_dataset(5), ("the dataset", "int"), InputError),  # type: ignore[arg-type]
    Case("dataset: a stranger's home", lambda *_: read_dataset("~nobody-of-this-name/a.jsonl"), ("home directory",)),
    _row("a list", [1], "list", "JSON object"),
    _row("messages and media", {"messages": [], "image": "a.png"}, "beside 'messages'"),
    _row("an address", {"prompt": "?", "image": "https://example.org/a.png"}, "nothing is fetched"),
    _row("a number as a picture", {"prompt": "?", "image": 5}, "image", "int", "path"),
    _row("base64 as a path", {"prompt": "?", "image": "iVBORw0KGgo" * 99}, "data:image/png;base64"),
    _row("a null character", {"prompt": "?", "image": "a\0b"}, "null character"),
    _row("a stranger's home", {"prompt": "?", "image": "~nobody-of-this-name/a.png"}, "home directory"),
    _row("an OpenAI part that is not there",
         {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "setup.py"}}]}]},
         "setup.py does not exist", "relative to the dataset's file"),
    _row("a column of pictures", {"prompt": "?", "images": ["a.png"]}, "'images' is not read", "write 'image'"),
    _row("a column of addresses", {"prompt": "?", "audio_url": "a.wav"}, "'audio_url' is not read", "write 'audio'"),
    _row("a misspelt column", {"prompt": "?", "imgae": "a.png"}, "'imgae' is not read", "write 'image'"),
    _row("a decoded sound", {"prompt": "?", "audio": {"array": [0.1]}}, "'audio' holds ['array']", "give a path"),
    _row("a file: URL that is not there", {"prompt": "?", "image": "file:pyproject.toml"}, "pyproject.toml does not"),
    _medium("a folder", lambda path: path.mkdir(), "not a regular file"),
    _medium("a pipe", os.mkfifo, "not a regular file"),
    _medium("an endless device", lambda path: path.symlink_to("/dev/zero"), "not a regular file", kind="audio"),
    _medium("empty", lambda path: path.touch(), "empty"),
    _medium("a playlist", lambda path: path.write_text("#EXTM3U\na.mp3"), "playlist", kind="audio"),
    _medium("a file that cannot be read", lambda path: path.symlink_to("/proc/self/mem"), "cannot be read"),
    _medium("a file of a terabyte", _sparse(10**12), "64,000,000,000 bytes", kind="video"),
    _medium("a link to itself", lambda path: path.symlink_to("a.bin"), "cannot be"),
    _command("a thousand million slots", "slots is 1000000000", "GB", "ask for", slots=10**9),
    _command("no slots", "slots is 0", slots=0),
    _command("a million million tokens", "max_new_tokens is 1000000000000", "context", max_new_tokens=10**12),
    _command("a negative seed", "seed is -1", seed=-1, max_new_tokens=4),
    _command("no rows", "limit is 0", limit=0),
    _command("a setting that fits no row", "no row fits", "turns", task="mt-bench"),
    _command("a metric for choices", "leave out --metric", row=ROW | {"choices": ["a", "b"], "answer": 0},
             metric=("exact",)),
    _command("speech without a recogniser", "--recogniser", **SPEECH),
    _command("a recogniser without a function", "'os'", "module:function", **SPEECH, recogniser="os"),
    _command("a recogniser of nowhere", "no.such:one", "cannot be loaded", **SPEECH, recogniser="no.such:one"),
    _command("a recogniser that is none", "is no function", **SPEECH, recogniser="math:pi"),
    _command("a recogniser that raises", "recogniser failed", "RuntimeError", **SPEECH, recogniser=f"{HERE}:raising"),
    _command("a recogniser that is silent", "NoneType", "as text", **SPEECH, recogniser=f"{HERE}:silent"),
    _command("drafts without a drafter", "need a drafter", draft_tokens=2, max_new_tokens=4),
    _command("an output in /proc", "/proc/nowhere cannot be written", output=Path("/proc/nowhere"), max_new_tokens=4),
    _output("run.json that is a list", lambda folder: (folder / "run.json").write_text("[]"), "no JSON object"),
    _output("run.json cut short", lambda folder: (folder / "run.json").write_text('{"a'), "no valid JSON", "choose"),
    _output("run.json of another run", lambda f: (f / "run.json").write_text('{"seed": 1}'), "seed was 1"),
    _output("run.json that is a pipe", lambda f: ((f / "run.json").unlink(), os.mkfifo(f / "run.json")), "run.json"),
    _output("report.md that is a folder", lambda f: (f / "report.md").mkdir(), "report.md", "choose another directory"),
    _output("a plot that is a pipe", lambda folder: os.mkfifo(folder / "lengths.png"), "lengths.png", "choose another"),
    _output("results that are a folder", lambda f: (f / "results-00000.jsonl").mkdir(), "not a regular file", "choose"),
    _output("results that are a pipe", lambda f: os.mkfifo(f / "results-00007.jsonl"), "not a regular file", "choose"),
    _output("results of nobody knows what",
            lambda f: ((f / "run.json").unlink(), (f / "results-00000.jsonl").write_text("")), "no run.json", "choose"),
    _held("a bare id", '{"id": "#0"}', "'category'"),
    _held("a list", "[]", "list"),
    _held("an id that is a number", '{"id": 0, "category": "", "scores": {}}', "'id'", "int"),
    _held("a score that is text", '{"id": "0", "category": "", "scores": {"exact": "1"}}', "'exact'", "str"),
    _held("errors in no words", '{"id": "0", "category": "", "scores": {"word_errors": 1.0}}', "go together"),
    _held("310 digits", '{"id": "0", "category": "", "scores": {"exact": ' + "9" * 310 + "}}", "no amount"),
    _held("negative words", '{"id": "0", "category": "", "scores": {"word_errors": 0, "words": -1}}', "no amount"),
    _held("a turn that is a number", '{"id": "0", "category": "", "scores": {}, "turns": [1]}', "a turn", "int"),
    _held("100,000 brackets", "[" * 100_000, "nested too deep"),
    _held("a line of zeros", "\0" * 1000, "UTF-8"),
]  # fmt: skip]  # fmt: skip
