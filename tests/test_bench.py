"""The benchmark runs end to end, its figures fit together, and it does not measure less than it was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import __main__ as bench
from scripts.bench import drafting as bench_speculative
from scripts.bench import speech as bench_speech
from scripts.bench import text as bench_text
from scripts.bench.worker import Bench, Worker

SPEECH = Bench(speech=True, prompt=16, new=10, frames=4, batch=2, repetitions=1, threads=1)


@pytest.fixture(scope="module")
def ours(checkpoints: Callable[[str], Path]) -> bench_speech.Ours:
    return bench_speech.Ours(SPEECH, checkpoints("tiny"))


@pytest.fixture(scope="module")
def theirs(checkpoints: Callable[[str], Path]) -> bench_speech.Theirs:
    pytest.importorskip("transformers")
    return bench_speech.Theirs(SPEECH, checkpoints("tiny"))


def test_text_in_a_process_of_its_own() -> None:
    settings = Bench(prompt=8, new=4, repetitions=1)
    figures = bench.run(settings)
    found = figures["ours"]
    assert found["prefill_tokens_per_second"] * found["time_to_first_token"] == pytest.approx(8)
    assert found["compile_seconds"] > 0.1 and found["peak_bytes"] > 1e8
    assert all(label in bench.table(settings, figures) for label, *_ in (*bench_text.ROWS, *bench.COMMON_ROWS))


@pytest.mark.parametrize("system", ["ours", "theirs"])
def test_speech(system: str, request: pytest.FixtureRequest) -> None:
    seconds = request.getfixturevalue(system).repeat()
    assert min(seconds.values()) > 0
    assert (seconds["first_audio"] < seconds["reply"]) == (system == "ours"), "only ours streams"
    figures = bench_speech.figures(SPEECH, seconds)
    sound = SPEECH.batch * SPEECH.frames / 12.5
    assert figures["code2wav_factor"] * sound == pytest.approx(seconds["code2wav"])
    assert figures["speech_factor"] == pytest.approx(figures["talker_factor"] + figures["code2wav_factor"])
    assert figures["frames_per_second"] * seconds["other_frames"] == pytest.approx(SPEECH.batch * (SPEECH.frames - 1))


@pytest.mark.parametrize("system", [bench_speculative.ours, bench_speculative.theirs])
def test_drafting(system: Callable, checkpoints: Callable[[str], Path]) -> None:
    """The repetition itself raises if a width gives other tokens than plain decoding."""
    settings = Bench(speculative=True, prompt=8, new=18, batch=2, repetitions=1, threads=1)
    seconds = system(settings, checkpoints("tiny")).repeat()
    figures = bench_speculative.figures(settings, seconds)
    assert figures["oracle_8"] * seconds["oracle_8"] == pytest.approx(2 * 17)
    assert figures["gain_16"] == pytest.approx(seconds["plain"] / seconds["oracle_16"])
    assert all(key in figures for _, key, *_ in bench_speculative.ROWS)


def test_too_few_frames_of_ours_are_an_error(ours: bench_speech.Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    _, requests = ours.stream()
    speakers = ours._speakers
    monkeypatch.setattr(ours, "_speakers", lambda frames: speakers(frames - 1))
    with pytest.raises(RuntimeError, match=r"frames: \[3, 3\] made, \[4, 4\] asked for"):
        ours.speak(requests, SPEECH.frames)
    with pytest.raises(RuntimeError, match="samples"):
        ours.stream()


def test_too_few_frames_of_theirs_are_an_error(theirs: bench_speech.Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs.reply()
    speak = theirs.speak
    monkeypatch.setattr(theirs, "speak", lambda **asked: speak(**{**asked, "max_new_tokens": SPEECH.frames}))
    with pytest.raises(RuntimeError, match=r"frames: \(2, 3\) made, \(2, 4\) asked for"):
        theirs.codes(SPEECH.frames)


def test_a_measured_process_that_fails_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="process that measures 'ours' failed"):
        Worker("ours", Bench(), tmp_path)


@pytest.mark.parametrize("wrong", [{"frames": 1}, {"repetitions": 0}, {"prompt": 7}])
def test_settings_that_give_no_figures_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give at least"):
        Bench(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"speech": True, "load": True},
        {"load": True, "against": "hf"},
        {"load": True, "shape": "full"},
        {"scaling": True, "load": True},
    ],
)
def test_kinds_that_do_not_go_together_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"one of|alone|choose large"):
        Bench(**wrong)
