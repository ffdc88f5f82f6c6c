"""The command line, run in this process: answers on stdout, the rest on stderr, and exit statuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import convert
from omni_jax.cli import main


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("converted") / "tiny"
    convert.convert_checkpoint(checkpoints("tiny"), destination, progress=False)
    return destination


def ask(model: Path, *more: str, new: int = 5) -> list[str]:
    return ["--model", str(model), "--text", "What is this?", "--max-new-tokens", str(new), *more]


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
    assert "--drafter" in capsys.readouterr().err


def test_a_conversation_from_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps([{"role": "user", "content": "What is this?"}]))
    main(["generate", "--model", str(model), "--messages", str(path), "--max-new-tokens", "5"])
    from_file = capsys.readouterr().out
    main(["generate", *ask(model)])
    assert capsys.readouterr().out == from_file


def test_inspect_counts_both_kinds_alike(
    model: Path, checkpoints: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    reports = []
    for path in (model, checkpoints("tiny")):
        main(["inspect", str(path), "--json"])
        reports.append(json.loads(capsys.readouterr().out))
    ours, theirs = reports
    assert ours["kind"] != theirs["kind"]
    assert ours["parts"] == theirs["parts"] and set(ours["parts"]) == {"thinker", "talker", "code2wav"}
    assert ours["bytes"] == 4 * ours["parameters"] and ours["thinker_bytes"] > ours["parts"]["thinker"]["bytes"]
    main(["inspect", str(model), "--dtype", "bfloat16", "--batch", "2", "--json"])
    half = json.loads(capsys.readouterr().out)
    assert half["bytes"] * 2 == ours["bytes"] and half["cache_bytes"] == ours["cache_bytes"]
    main(["inspect", str(model)])
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


def test_other_directories_are_named_with_the_remedy(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, message in ((checkpoints("tiny"), "python -m convert"), (tmp_path, "not a converted checkpoint")):
        with pytest.raises(SystemExit) as stop:
            main(["generate", *ask(path)])
        assert stop.value.code == 3 and message in capsys.readouterr().err


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["generate"], ["translate"], ["generate", "--model", "x", "--top-k", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
