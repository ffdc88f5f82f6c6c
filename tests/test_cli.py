"""The command line, run in this process: answers on stdout, the rest on stderr, and exit statuses."""

import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from omni_jax import process
from omni_jax.cli import main
from omni_jax.printing import json_text
from omni_jax.weights import checkpoint
from scripts.interrupts import LIMIT, SAMPLES, commands, try_command

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("converted") / "tiny"
    convert.convert_checkpoint(checkpoints("tiny"), destination, progress=False)
    return destination


def ask(model: Path, *more: str, new: int = 5) -> list[str]:
    return ["--model", str(model), "--text", "What is this?", "--max-new-tokens", str(new), *more]


@pytest.fixture(scope="module")
def answer(model: Path) -> str:
    """What `generate` prints for the question of `ask`."""
    with redirect_stdout(io.StringIO()) as out:
        main(["generate", *ask(model)])
    return out.getvalue()


def test_generate_answers_about_a_picture(model: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = ["--image", str(data_dir / "chelsea.png")]
    main(["generate", *ask(model, *picture, "--json")])
    out, err = capsys.readouterr()
    reply = json.loads(out)
    main(["generate", *ask(model, *picture, *picture, "--json")])
    twice = json.loads(capsys.readouterr().out)
    assert twice["stats"]["prompt_tokens"] > 1.8 * reply["stats"]["prompt_tokens"], "every flag counts"
    assert len(reply["token_ids"]) == reply["stats"]["new_tokens"] <= 5
    assert reply["stats"]["prompt_tokens"] > 100 and "loading" in err


def test_stream_prints_what_generate_prints(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", *ask(model, new=12)])
    whole = capsys.readouterr().out
    main(["stream", *ask(model, new=12)])
    assert capsys.readouterr().out == whole
    main(["stream", *ask(model, "--json", new=12)])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(event["text"] for event in events) + "\n" == whole
    assert events[-1]["reply"]["text"] + "\n" == whole and all(event["reply"] is None for event in events[:-1])


def test_generate_speaks_into_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import soundfile

    sounds = []
    for name, command in (("a.wav", "generate"), ("b.flac", "stream")):
        path, options = tmp_path / name, ("--speaker", "Aiden", "--max-frames", "6", "--json")
        main([command, *ask(model, "--speak", str(path), *options)])
        out, err = capsys.readouterr()
        assert str(path) in err and "the limit of frames" in err
        sounds.append(soundfile.read(path))
    last = json.loads(out.splitlines()[-1])["reply"]
    (first, rate), (second, _) = sounds
    assert rate == 24_000 and len(first) / rate == last["stats"]["audio_seconds"]
    np.testing.assert_allclose(first, second, atol=2**-14)  # the kinds round differently
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b.flac"]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--speak", "x.mp3"), ".wav or .flac"),
        (("--speak", "nowhere/x.wav"), "folder"),
        (("--speak", "x.wav", "--speaker", "nobody"), "aiden"),
        (("--speak", "x.wav", "--max-frames", "0"), "max_frames is 0"),
    ],
)
def test_speech_that_cannot_be_made(
    model: Path, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="3"):
        main(["generate", *ask(model, *options)])
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_drafter_changes_nothing_in_the_answer(
    model: Path, drafters: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["generate", *ask(model, new=12)])
    plain = capsys.readouterr().out
    block, chain = (["--drafter", str(drafters(kind, "tiny")), "--draft-tokens"] for kind in ("dflash", "eagle3"))
    for flags in ([*block, "3"], [*block, "auto"], [*chain, "5", "--draft-tree", "2", "3"]):
        main(["generate", *ask(model, *flags, new=12)])
        out, err = capsys.readouterr()
        assert out == plain and "rounds of drafting" in err
    main(["generate", *ask(model, *block, "3", "--draft-sampling", "--temperature", "1.5", new=12)])
    out, err = capsys.readouterr()
    assert out not in ("", plain) and "rounds of drafting" in err
    with pytest.raises(SystemExit, match="3"):
        main(["generate", *ask(model, "--draft-tokens", "3")])
    assert "draft_sampling need a drafter" in capsys.readouterr().err


def test_a_conversation_from_a_file(
    model: Path, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": "What is this?"}]))
    main(["generate", "--model", str(model), "--messages", str(path), "--max-new-tokens", "5"])
    assert capsys.readouterr().out == answer


@pytest.mark.parametrize("form", ["list", "object", "BOM", "UTF-16", "stdin"])
def test_forms_of_a_conversation(
    form: str, model: Path, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    messages: Any = [{"role": "user", "content": "What is this?"}]
    text = json.dumps({"messages": messages, "tools": None} if form == "object" else messages)
    data = text.encode({"BOM": "utf-8-sig", "UTF-16": "utf-16"}.get(form, "utf-8"))
    (tmp_path / "m.json").write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    main(
        [
            "generate",
            "--model",
            str(model),
            "--max-new-tokens",
            "5",
            f"--messages={'-' if form == 'stdin' else '~/m.json'}",
        ]
    )
    assert capsys.readouterr().out == answer


def test_media_of_a_messages_file_are_beside_it(
    model: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the current folder has a file of the same name."""
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
    (there / "a.png").symlink_to(data_dir / "chelsea.png")
    (here / "a.png").write_text("another")
    content = [{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    (there / "m.json").write_text(json.dumps([{"role": "user", "content": content}]))
    monkeypatch.chdir(here)
    main(["generate", "--model", str(model), "--messages", "../there/m.json", "--max-new-tokens", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["stats"]["prompt_tokens"] > 200


def test_inspect_counts_both_kinds_alike(
    model: Path, checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for path in (model, checkpoints("tiny")):
        main(["inspect", "--model", str(path), "--json"])
        reports.append(json.loads(capsys.readouterr().out))
    ours, theirs = reports
    assert ours["kind"] != theirs["kind"]
    assert ours["parts"] == theirs["parts"] and set(ours["parts"]) == {"thinker", "talker", "code2wav"}
    assert ours["bytes"] == 4 * ours["parameters"] and ours["thinker_bytes"] > ours["parts"]["thinker"]["bytes"]
    main(["inspect", "--model", str(model), "--dtype", "bfloat16", "--batch", "2", "--json"])
    half = json.loads(capsys.readouterr().out)
    assert half["bytes"] * 2 == ours["bytes"] and half["cache_bytes"] == ours["cache_bytes"]
    main(["inspect", "--model", str(model)])
    assert f"{ours['parameters']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--temperature", "-1"], "temperature"),
        (["--messages", "nowhere.json"], "whole conversation"),
        (["--max-new-tokens", "99999999"], "context"),
        (["--video", "http://host/a.mp4"], "http"),
    ],
)
def test_bad_input_is_one_line_and_status_3(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", *ask(model), *arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == 3 and not out
    last = err.strip().splitlines()[-1]
    assert last.startswith("omni-jax: ") and message in last


def test_other_directories_are_named_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in ((tmp_path, "config.json is missing; take it"), (tmp_path / "a", "no such directory")):
        with pytest.raises(SystemExit) as stop:
            main(["generate", *ask(path)])
        assert stop.value.code == 3 and message in capsys.readouterr().err


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["generate"], ["translate"], ["generate", "--model", "x", "--top-k", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize("command, last", [("generate", "output"), ("stream", "output"), ("evaluate", "devices")])
def test_help_shows_the_question_first_and_then_groups(
    command: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    question = ["--data"] if command == "evaluate" else ["--text", "--image", "--audio", "--video", "--messages"]
    groups = [f"{name} options" for name in ("prompt", "media", "reply", "sampling", "speech", "drafting", "devices")]
    groups += ["output options"] if last == "output" else []
    order = ["--model", *question, *groups]
    places = [place.start() if (place := re.search(rf"{word}\b", out)) else -1 for word in order]
    assert -1 not in places and places == sorted(places)
    within = {"--top-p": "sampling", "--seed": "sampling", "--speaker": "speech", "--drafter": "drafting"}
    within |= {"--mesh": "devices", "--dtype": "devices", "--fps": "prompt", "--nframes": "media", "--stop": "reply"}
    _, *boxes = re.split(r"(\w+) options ", out)
    shown = dict(zip(boxes[::2], boxes[1::2], strict=True))
    assert all(re.search(rf"{flag}\b", shown[group]) for flag, group in within.items())


def test_speech_is_written_whoever_reads_the_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with unread("/dev/full") as descriptor:
        process.answer_on(descriptor)
        main(["stream", *ask(model, "--speak", str(tmp_path / "a.wav"), "--max-frames", "6")])
        assert isinstance(sys.stdout, process.SafeStream) and isinstance(sys.stdout.failure, OSError)
    assert soundfile.info(tmp_path / "a.wav").frames > 9000


def test_a_text_that_nobody_reads_is_not_written_to_its_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    with unread(None) as descriptor:
        process.answer_on(descriptor)
        with pytest.raises(SystemExit) as end:
            main(["stream", *ask(model, new=100)])
    assert end.value.code is None and "ended by" not in capsys.readouterr().err


@contextmanager
def unread(device: str | None) -> Iterator[int]:
    """A descriptor to write to: of a device, or of a pipe that nobody reads."""
    if device is None:
        reading, descriptor = os.pipe()
        os.close(reading)
    else:
        descriptor = os.open(device, os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def run(*command: str, **options: Any) -> subprocess.CompletedProcess:
    """Python as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-m", *command], env=environment, text=True, timeout=LIMIT, **pipes)


def test_inspect_as_a_process(model: Path) -> None:
    with unread(None) as pipe, unread("/dev/full") as full:
        assert (
            done := run("omni_jax.cli", "inspect", "--model", str(model), stdout=pipe)
        ).returncode == 141 and not done.stderr
        done = run("omni_jax", "inspect", "--model", str(model), stdout=full)
        assert done.returncode == 3 and "no space left" in done.stderr and len(done.stderr.splitlines()) == 1


def test_other_devices_than_there_are(model: Path) -> None:
    for asked in ("cuda", "nonsense"):
        done = run("omni_jax", "generate", *ask(model), env={"JAX_PLATFORMS": asked})
        assert done.returncode == 3 and len(done.stderr.splitlines()) == 1
        assert f"omni-jax: JAX_PLATFORMS={asked}: no such device" in done.stderr and "unset it" in done.stderr


def test_a_terminal_without_unicode(model: Path, tmp_path: Path) -> None:
    (tmp_path / "modèle").symlink_to(model)
    for asked, said in ((["--help"], "generate"), (["inspect", "--model", str(tmp_path / "modèle")], "mod?le")):
        done = run("omni_jax", *asked, env={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and said in done.stdout


def test_json_is_whole_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, letters in (("utf-8", "音"), ("UTF8", "音"), ("ascii", "\\u97f3"), ("iso8859-1", "\\u97f3")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert json_text({"text": "音"}) == f'{{"text": "{letters}"}}'


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nMore")]
)
def test_too_little_memory_is_one_line(
    error: Exception, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "restore", fail)
    with pytest.raises(SystemExit, match="3"):
        main(["generate", *ask(model)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("omni-jax: there is too little memory (") and "--max-new-tokens" in last


def test_bugs_keep_their_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(checkpoint, "restore", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", *ask(model)])


@pytest.mark.slow
def test_an_interrupt_ends_every_command(model: Path, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """A few moments of the time that each takes here; scripts/interrupts.py tries more."""
    rows = [{"id": f"q{i}", "prompt": "word " * (i + 1), "reference": "x"} for i in range(SAMPLES)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tried = commands(checkpoints("tiny"), model, tmp_path / "data.jsonl")
    for command in tried:
        assert try_command(command, 2, random.Random(0), tmp_path / command.name) == []
