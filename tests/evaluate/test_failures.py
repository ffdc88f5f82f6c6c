"""What fails in a run: which rows, what is said, what a second run of the same command does."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax.errors import InputError, MemoryLimitError
from omni_jax.evaluate import metrics, tasks
from omni_jax.evaluate.loglikelihood import Scored
from omni_jax.evaluate.stored import read_all
from omni_jax.inputs import processor as processor_module
from omni_jax.inputs.processor import Processor
from omni_jax.weights import checkpoint
from tests.evaluate.stub import StubOmni
from tests.helpers.commands import OPAQUE, hear, status_of
from tests.helpers.datasets import write

RAISED = (
    UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte"),
    AttributeError("'NoneType' object has no attribute 'sample_rate'"),
    RuntimeError("Failed to decode frame 0: <avif.Decoder object at 0x7f3fa0>"),
    OSError(5, "Input/output error"),
    MemoryError(),
    RecursionError("maximum recursion depth exceeded"),
    KeyError("codec"),
)


@pytest.fixture
def asked(model: Path, tmp_path: Path) -> list[str]:
    """A command, but for its data."""
    return ["evaluate", "--model", str(model), "--output", str(tmp_path / "out"), "--max-new-tokens", "4", "--json"]


def without_reply(asked: list[str]) -> list[str]:
    """The same for a task that makes no reply."""
    at = asked.index("--max-new-tokens")
    return asked[:at] + asked[at + 2 :]


@pytest.fixture
def stub(model: Path, monkeypatch: pytest.MonkeyPatch) -> StubOmni:
    """What the command loads."""
    config = checkpoint.read_config(model)
    stub = StubOmni(config, Processor.from_dir(model, config))
    monkeypatch.setattr(omni_jax, "load", lambda *_, **__: stub)
    return stub


def results(asked: list[str]) -> dict[str, dict]:
    return {result["id"]: result for result in read_all(Path(asked[asked.index("--output") + 1]))}


def latin_1_mp3(path: Path) -> None:
    """A sound whose ID3 tag has a title that is no UTF-8."""
    _encode(path, "mp3", "libmp3lame")
    path.write_bytes(path.read_bytes() + b"TAG" + b"caf\xe9".ljust(125, b"\0"))


def latin_1_mp4(path: Path) -> None:
    """A sound in an MP4 whose title is no UTF-8."""
    _encode(path, "mp4", "aac", title="cafe song")
    path.write_bytes(path.read_bytes().replace(b"cafe song", b"caf\xe9 song"))


def unknown_codec(path: Path) -> None:
    """A sound in a container that names a codec nobody has heard of."""
    _encode(path, "matroska", "aac")
    path.write_bytes(path.read_bytes().replace(b"A_AAC", b"A_ZZZ"))


def damaged_avif(path: Path) -> None:
    """A picture that can be opened and not decoded."""
    from PIL import Image

    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(data, "AVIF")
    content = bytearray(data.getvalue())
    content[content.index(b"mdat") + 4] ^= 0xFF
    path.write_bytes(content)


def io_error(path: Path) -> None:
    """A file that can be opened and not read."""
    path.symlink_to("/proc/self/mem")


def _encode(path: Path, container: str, codec: str, **tags: str) -> None:
    import av

    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=24_000, layout="mono")
        file.metadata.update(tags)
        wave = np.sin(np.arange(24_000) / 20).astype(np.float32)[None] / 4
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = 24_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)


BROKEN: dict[str, tuple[str, Callable[[Path], None], bool]] = {
    "tag.mp3": ("audio", latin_1_mp3, True),
    "title.mp4": ("audio", latin_1_mp4, True),
    "codec.mkv": ("audio", unknown_codec, False),
    "damaged.avif": ("image", damaged_avif, False),
    "unreadable.wav": ("audio", io_error, False),
}


def test_one_file_of_each_kind(
    asked: list[str], stub: StubOmni, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("PIL.AvifImagePlugin")
    rows = [{"prompt": "fine", "id": "before"}]
    for name, (kind, make, _) in BROKEN.items():
        make(tmp_path / name)
        rows.append({"prompt": f"about {name}", kind: name, "id": name})
    data = write(tmp_path / "rows.jsonl", *rows, {"prompt": "fine too", "id": "after"})
    asked = [*asked, "--data", str(data)]

    assert status_of(asked) == 4
    out, err = capsys.readouterr()
    summary, readable = json.loads(out), [name for name, (*_, fine) in BROKEN.items() if fine]
    assert summary["scored"] == 2 + len(readable)
    assert {name for name, one in results(asked).items() if "error" not in one} == {"before", "after", *readable}
    named = {one["where"].removeprefix("sample "): one["why"] for one in summary["not_scored"]}
    assert sorted(named) == ["codec.mkv", "damaged.avif", "rows.jsonl:6"]
    assert "cannot be read (" in named["rows.jsonl:6"]
    assert summary["failed"] + summary["rows_skipped"] == len(named)
    for where, why in named.items():
        assert any(name in where + why for name in BROKEN)
        assert why in err and "object at" not in why
        assert why.replace("|", "\\|") in (tmp_path / "out" / "report.md").read_text(), where

    # Again: what failed is tried, fails alike, and is not written twice.
    before = (tmp_path / "out" / "results-00000.jsonl").read_bytes()
    assert status_of(asked) == 4 and (tmp_path / "out" / "results-00000.jsonl").read_bytes() == before
    assert json.loads(capsys.readouterr().out) == summary

    for name, (kind, _, fine) in BROKEN.items():
        if not fine:
            (tmp_path / name).unlink()
            shutil.copy(data_dir / ("chelsea.png" if kind == "image" else "flite_slt_fox.flac"), tmp_path / name)
    stub.prompts.clear()
    assert status_of(asked) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["scored"] == len(rows) + 1 and "not_scored" not in summary
    assert len(stub.prompts) == 3, "what was scored is not done again"
    assert "could not be used" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("task", ["generate", "loglikelihood", "speech"])
def test_whatever_a_reader_raises_is_the_rows(
    task: str,
    raised: Exception,
    asked: list[str],
    stub: StubOmni,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("jiwer")
    rows = [{"prompt": name, "reference": "a", "id": name} for name in "abc"]
    shutil.copy(data_dir / "chelsea.png", tmp_path)
    data = write(tmp_path / "rows.jsonl", *rows, {**rows[0], "id": "bad", "image": "chelsea.png"}, {**rows[0], "id": 2})
    asked = [*(without_reply(asked) if task == "loglikelihood" else asked), "--data", str(data), "--task", task]
    asked += ["--recogniser", f"{hear.__module__}:hear"] if task == "speech" else []
    monkeypatch.setattr(tasks, "log_likelihoods", weigh)
    monkeypatch.setattr(tasks, "prepare_choices", lambda omni, context, texts: [tasks.Continuation(context, [1])])
    with monkeypatch.context() as broken:
        broken.setattr(processor_module, "load_image", raiser(raised))
        assert status_of(asked) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["scored"] == 4 and "failed sample bad: " in err
    assert not OPAQUE.search(err)
    assert status_of(asked) == 0 and results(asked)["bad"].get("error") is None


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def weigh(omni: Any, asked: list, rows: int) -> list[Scored]:
    return [Scored(-1.0, True, 1) for _ in asked]


def test_a_prompt_that_cannot_be_computed_is_found_among_those_beside_it(
    asked: list[str], stub: StubOmni, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"row {i}", "id": f"{i}"} for i in range(9)]
    rows[5] = {"turns": ["row 5", "too long"], "id": "5"}
    data = write(tmp_path / "rows.jsonl", *rows)
    stub.poison = {"row 3", "too long"}
    assert status_of([*asked, "--data", str(data), "--task", "generate", "--slots", "3"]) == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["scored"] == 7 and len(read_all(tmp_path / "out")) == 9
    failed = {name: one["error"] for name, one in results(asked).items() if "error" in one}
    assert set(failed) == {"3", "5"} and "out of memory" in failed["3"] and not OPAQUE.search(err)
    # The others stay together: only those beside a failure are asked alone.
    assert [call["slots"] for call in stub.asked["generate_many"]].count(3) == 3


def test_speech_that_cannot_be_computed_is_found_among_those_beside_it(
    asked: list[str], stub: StubOmni, tmp_path: Path
) -> None:
    pytest.importorskip("jiwer")
    data = write(tmp_path / "rows.jsonl", *[{"prompt": f"row {i}", "id": f"{i}"} for i in range(5)])
    stub.poison = {"row 3"}
    speak = ["--task", "speech", "--recogniser", f"{hear.__module__}:hear", "--slots", "3"]
    assert status_of([*asked, "--data", str(data), *speak]) == 4
    assert [name for name, one in results(asked).items() if "error" in one] == ["3"]
    assert stub.asked["generate_many"][0]["slots"] == 3


def crowd(stub: StubOmni, most: int, error: InputError) -> None:
    """Let the first prompt fail with `error` where there are more than `most` slots."""
    answers = stub._answers

    def crowded(prompts: Any, slots: int) -> Any:
        if slots > most:
            next(prompts)
            raise error
        yield from answers(prompts, slots)

    stub._answers = crowded  # type: ignore[method-assign]


def test_a_prompt_that_does_not_fit_beside_others_is_asked_alone(
    asked: list[str], stub: StubOmni, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single row too: more slots than it needs take memory."""
    crowd(stub, 1, InputError("this request would take 99 GB"))
    for count in (1, 3):
        data = write(tmp_path / f"{count}.jsonl", *[{"prompt": f"{i}"} for i in range(count)])
        assert status_of([*asked, "--data", str(data), "--output", str(tmp_path / f"out{count}")]) == 0
        assert json.loads(capsys.readouterr().out)["scored"] == count


def test_slots_that_memory_does_not_hold_are_halved_once_for_all(
    asked: list[str], stub: StubOmni, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd(stub, 3, MemoryLimitError("this request would take 99 GB"))
    data = write(tmp_path / "rows.jsonl", *[{"prompt": f"{i}"} for i in range(9)])
    assert status_of([*asked, "--data", str(data), "--slots", "12", "--max-new-tokens", "7"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["scored"] == 9 and "99 GB; going on with 6 slots" in err and "with 3 slots" in err
    calls = stub.asked["generate_many"]
    assert [call["slots"] for call in calls] == [12, 6, 3] and {call["max_new_tokens"] for call in calls} == {7}


def test_texts_that_cannot_be_weighed_are_found_among_those_beside_them(
    asked: list[str], stub: StubOmni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{i}", "reference": "a"} for i in range(5)]
    data, groups = write(tmp_path / "rows.jsonl", *rows), []

    def weigh_few(omni: Any, asked: list, rows: int) -> list[Scored]:
        groups.append(len(asked))
        if any(one.context.token_ids[0, 0] == ord("2") for one in asked):
            raise RuntimeError("out of memory")
        return weigh(omni, asked, rows)

    monkeypatch.setattr(tasks, "log_likelihoods", weigh_few)
    monkeypatch.setattr(tasks, "prepare_choices", lambda omni, context, texts: [tasks.Continuation(context, [1])])
    asked = without_reply(asked)
    assert status_of([*asked, "--data", str(data), "--task", "loglikelihood", "--slots", "2"]) == 4
    assert [name for name, one in results(asked).items() if "error" in one] == ["#2"] and groups == [4, 1, 1, 1, 1, 1]


def test_every_sample_fails(
    asked: list[str], stub: StubOmni, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    data = write(tmp_path / "rows.jsonl", *[{"prompt": "?", "image": "a.png"}] * 30)
    assert status_of([*asked, "--data", str(data)]) == 4
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["scored"], summary["failed"]) == (0, 30) and len(summary["not_scored"]) == 20
    assert err.count("failed sample") == 20 and "failed 10 more; the report names all" in err
    assert (tmp_path / "out" / "report.md").read_text().count("a.png") == 30


def test_media_that_have_changed_are_asked_again(
    asked: list[str], stub: StubOmni, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(data_dir / "flower.jpg", tmp_path / name)
    rows = [{"prompt": name, "image": name, "id": name} for name in ("a.jpg", "b.jpg")]
    asked = [*asked, "--data", str(write(tmp_path / "rows.jsonl", *rows, {"prompt": "text", "id": "text"}))]
    assert status_of(asked) == 0 and len(read_all(tmp_path / "out")) == 3
    kept = (tmp_path / "a.jpg").read_bytes()
    stub.prompts.clear()
    shutil.copy(data_dir / "china.jpg", tmp_path / "a.jpg")
    capsys.readouterr()
    assert status_of(asked) == 0 and len(stub.prompts) == 1
    assert "again sample a.jpg: its media have changed since it was scored" in capsys.readouterr().err
    assert len(read_all(tmp_path / "out")) == 4
    # With the first picture back, its own score stands.
    (tmp_path / "a.jpg").write_bytes(kept)
    os.utime(tmp_path / "b.jpg")
    assert status_of(asked) == 0 and len(stub.prompts) == 1
    # Damaged now: what was said of the picture that is gone does not count.
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert status_of(asked) == 4 and json.loads(capsys.readouterr().out.splitlines()[-1])["scored"] == 2


def silent(wave: np.ndarray, rate: int) -> None:
    return None


def failing(wave: np.ndarray, rate: int) -> str:
    raise RuntimeError("no GPU at 0x7f00aa00")


def moody(wave: np.ndarray, rate: int) -> Any:
    """Copes with silence, and with nothing else."""
    return "" if len(wave) == rate else failing(wave, rate)


def taciturn(wave: np.ndarray, rate: int) -> Any:
    return "" if len(wave) == rate else None


@pytest.mark.parametrize("name, status, why", [
    ("silent", 3, "the recogniser returned a NoneType; it must return what it heard as text"),
    ("failing", 3, "the recogniser failed (RuntimeError: no GPU"),
    ("moody", 4, "failed sample #0: the recogniser failed (RuntimeError: no GPU"),
    ("taciturn", 4, "failed sample #0: the recogniser returned a NoneType"),
])  # fmt: skip
def test_recognisers_that_fail(
    name: str, status: int, why: str, asked: list[str], stub: StubOmni, tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("jiwer")
    data = write(tmp_path / "rows.jsonl", {"prompt": "Speak."})
    asked = [*asked, "--data", str(data), "--task", "speech", "--recogniser", f"{__name__}:{name}"]
    assert status_of(asked) == status
    err = capsys.readouterr().err
    assert why in err and not OPAQUE.search(err)
    assert bool(stub.asked["generate_many"]) == (status == 4), "what can be known before is known before"


def test_a_metric_that_fails_is_the_rows(
    asked: list[str], stub: StubOmni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(metrics.METRICS, "exact", raiser(OverflowError("too large")))
    data = write(tmp_path / "rows.jsonl", {"prompt": "a", "reference": "a"})
    assert status_of([*asked, "--data", str(data), "--metric", "exact"]) == 4
    assert "too large" in results(asked)["#0"]["error"]


@pytest.mark.parametrize("name", ["report.md", "summary.json", "categories.png"])
def test_a_disk_that_fills_while_the_report_is_written(
    name: str,
    asked: list[str],
    stub: StubOmni,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"prompt": c, "category": c, "reference": c} for c in "ab"]
    asked = [*asked, "--data", str(write(tmp_path / "rows.jsonl", *rows))]
    replace = os.replace

    def full(part: Path, path: Path) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        replace(part, path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert status_of(asked) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "omni-jax:" in line]
    assert "report cannot be written (no space left on device); the results are safe" in line
    assert not [*(tmp_path / "out").glob(".*")], "nothing half written stays"
    stub.prompts.clear()
    assert status_of(asked) == 0 and not stub.prompts and (tmp_path / "out" / name).exists()
