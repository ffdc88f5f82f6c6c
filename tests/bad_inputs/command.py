"""Command lines that cannot be followed: flags, messages files and places of answers, before any weight is read."""

import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

from convert.__main__ import main as convert
from omni_jax.cli import main
from omni_jax.errors import InputError
from omni_jax.weights import checkpoint
from tests.bad_inputs.case import Case

USER = {"role": "user", "content": "Hello"}


def _refused(command: Callable[[list[str]], Any], arguments: list[str]) -> None:
    """Raise what a command says as it ends with status 3, in one line and without having read weights."""
    said = io.StringIO()
    with redirect_stderr(said), patch.object(checkpoint, "restore", side_effect=AssertionError("weights were read")):
        try:
            status = command(arguments)
        except SystemExit as end:
            status = end.code
    assert status == 3, f"status {status}: {said.getvalue()}"
    (line,) = said.getvalue().strip().splitlines()
    assert line.startswith(("omni-jax: ", "error: "))
    raise InputError(line)


def _ask(name: str, arguments: str, *words: str, before: Callable[[Path], Any] = lambda _: None) -> Case:
    """`omni-jax generate` with arguments, in which {at} is a folder of its own and {model} the tiny checkpoint."""

    def act(folder: Path, world: Any) -> None:
        before(folder)
        given = [each.format(at=folder, model=world.converted) for each in arguments.split()]
        _refused(main, ["generate", *(() if "--model" in arguments else ("--model", str(world.converted))), *given])

    return Case(f"command: {name}", act, words)


def _messages(name: str, content: bytes | Any, *words: str) -> Case:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return _ask(
        f"messages, {name}", "--messages {at}/m.json", *words, before=lambda at: (at / "m.json").write_bytes(data)
    )


def _from_stdin(name: str, data: bytes, *words: str) -> Case:
    def act(_: Path, world: Any) -> None:
        with patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data))):
            _refused(main, ["generate", "--model", str(world.converted), "--messages", "-"])

    return Case(f"command: standard input, {name}", act, ("standard input", *words))


def _convert(name: str, arguments: str, *words: str) -> Case:
    def act(folder: Path, world: Any) -> None:
        _refused(convert, [each.format(at=folder, hf=world.hf, model=world.converted) for each in arguments.split()])

    return Case(f"command: convert, {name}", act, words)


def _inspect(name: str, where: str, *words: str) -> Case:
    return Case(
        f"command: inspect, {name}", lambda at, _: _refused(main, ["inspect", "--model", where.format(at=at)]), words
    )


CASES = [
    _ask("nothing asked", "", "--text", "--messages"),
    _ask("no model there", "--text Hi --model {at}/none", "none", "no such directory"),
    _ask("a model in a home that is none", "--text Hi --model=~nobody-of-this-name/m", "--model", "home directory"),
    _ask("a picture that is missing", "--text Hi --image {at}/none.png", "none.png", "no such file"),
    _ask("a sound that is missing", "--text Hi --audio {at}/none.wav", "none.wav", "no such file"),
    _ask("a video that is missing", "--text Hi --video {at}/none.mp4", "none.mp4", "no such file"),
    _ask("a folder as picture", "--text Hi --image {at}", "image"),
    _ask("an endless device as picture", "--text Hi --image /dev/zero", "/dev/zero", "regular file"),
    _ask("a temperature below 0", "--text Hi --temperature -1", "temperature", "greedy"),
    _ask("a temperature that is no number", "--text Hi --temperature nan", "temperature"),
    _ask("a negative top_k", "--text Hi --top-k -1", "top_k"),
    _ask("top_p above 1", "--text Hi --top-p 1.5", "top_p", "to 1 (off)"),
    _ask("min_p above 1", "--text Hi --min-p 2", "min_p"),
    _ask("no penalty at all", "--text Hi --repetition-penalty 0", "repetition_penalty"),
    _ask("a negative seed", "--text Hi --seed -1", "seed"),
    _ask("no tokens", "--text Hi --max-new-tokens 0", "max_new_tokens"),
    _ask("more tokens than the context", "--text Hi --max-new-tokens 99999999", "context", "ask for fewer"),
    _ask("a rate below 0", "--video {at}/none.mp4 --fps -1", "fps"),
    _ask("a mesh that is none", "--text Hi --mesh cube", "cube"),
    _ask("a mesh of 1,000 devices", "--text Hi --mesh expert=1000", "1000"),
    _ask("processes without --distributed", "--text Hi --processes 2", "--distributed"),
    _ask("a voice that nobody has", "--text Hi --speak {at}/a.wav --speaker nobody", "nobody", "aiden"),
    _ask("speech without frames", "--text Hi --speak {at}/a.wav --max-frames 0", "max_frames"),
    _ask("a voice below 0 degrees", "--text Hi --speak {at}/a.wav --speech-temperature -1", "speech_temperature"),
    _ask("speech as MP3", "--text Hi --speak {at}/a.mp3", ".wav or .flac"),
    _ask("speech into a folder", "--text Hi --speak {at}/a.wav", "directory", before=lambda at: (at / "a.wav").mkdir()),
    _ask("speech into no folder", "--text Hi --speak {at}/none/a.wav", "folder"),
    _ask("drafts without a drafter", "--text Hi --draft-tokens 3", "need a drafter"),
    _ask("a drafter that is none", "--text Hi --drafter {at}", "config.json"),
    _ask("messages beside a question", "--text Hi --messages {at}/m.json", "--messages", "--text"),
    _ask("messages that are missing", "--messages {at}/m.json", "m.json", "no such file"),
    _ask("an endless device as messages", "--messages /dev/zero", "/dev/zero", "regular file", "standard input"),
    _ask("a pipe as messages", "--messages {at}/p", "regular file", "- for", before=lambda at: os.mkfifo(at / "p")),
    _ask("a folder as messages", "--messages {at}", "regular file"),
    _messages("empty", b"", "m.json", "JSON"),
    _messages("no JSON", b"Hello", "m.json", "JSON"),
    _messages("Latin-1", '["é"]'.encode("latin-1"), "m.json", "UTF-8"),
    _messages("nested 100,000 deep", b"[" * 100_000, "m.json", "nested too deep"),
    _messages("a number", 5, "m.json", "list of messages"),
    _messages("text", "Hello", "m.json", "list of messages"),
    _messages("another object", {"prompt": "Hello"}, "m.json", "list of messages"),
    _messages("no message in the object", {"messages": []}, "empty"),
    _messages("settings beside the messages", {"messages": [USER], "temperature": 1}, "temperature"),
    _messages("a message that is text", ["Hello"], "message 0"),
    _messages("a picture beside the file that is missing", [USER | {"content": [{"type": "image", "image": "n.png"}]}],
              "n.png", "no such file"),
    _from_stdin("nothing", b"", "JSON"),
    _from_stdin("text", b"Hello", "JSON"),
    _from_stdin("more than a conversation can be", b"[" + b" " * 64_000_000 + b"]", "64,000,000 bytes"),
    _inspect("nothing there", "{at}/none", "none"),
    _inspect("an empty folder", "{at}", "config.json"),
    _convert("no source", "{at}/none {at}/made", "none", "no such directory"),
    _convert("an empty source", "{at} {at}/made", "config.json"),
    _convert("a converted source", "{model} {at}/made", "converted"),
    _convert("a part that there is not", "{hf} {at}/made --parts vision", "vision"),
    _convert("what is not converted, to verify", "--verify {hf}", "python -m convert"),
]  # fmt: skip
