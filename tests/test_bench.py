"""The benchmark runs end to end, its figures fit together, and it does not measure less than it was asked for."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from omni_jax.errors import InputError
from scripts.bench import compare, drafting, reading, rounding, speech, text, train
from scripts.bench.options import Rounding, Run, Scaling, Speech, Text, Train
from scripts.bench.our_speech import Ours
from scripts.bench.thinker import our_thinker
from scripts.bench.worker import ROOT, Worker

SPEECH = Speech(prompt=16, new=10, frames=4, batch=2, run=Run(repetitions=1, threads=1))
SHORT = Text(prompt=8, new=4, run=Run(repetitions=1))


@pytest.fixture(scope="module")
def ours(checkpoints: Callable[[str], Path]) -> Ours:
    return Ours(SPEECH, checkpoints("tiny"))


@pytest.fixture(scope="module")
def theirs(checkpoints: Callable[[str], Path]) -> Any:
    pytest.importorskip("transformers")
    from scripts.bench.their_speech import Theirs

    return Theirs(SPEECH, checkpoints("tiny"))


def test_reading_counts_what_a_token_reads(capsys: pytest.CaptureFixture[str]) -> None:
    model = our_thinker(SHORT.run, None)
    text_config, stacked = model.text, model.params["layers"]
    found = reading.measure(model, SHORT)
    experts = sum(stacked["moe"][name].nbytes for name in ("gate_up", "down"))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves([stacked, model.params["norm"], model.params["lm_head"]]))
    unread = experts * (1 - text_config.experts_per_token / text_config.num_experts)
    assert found["weights_per_token_bytes"] == whole - unread
    assert found["share"] == pytest.approx(found["tokens_per_second"] / found["most_tokens_per_second"])
    assert 0 < found["share"] < 2 and found["read_bytes_per_second"] > 1e8
    reading.report(SHORT)
    assert "of what memory gives" in capsys.readouterr().out


def test_rounding_costs_what_eight_bits_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounding.report(Rounding(shape="tiny", experts=4, rows=24, json=tmp_path / "found.json"))
    found, printed = json.loads((tmp_path / "found.json").read_text())["figures"], capsys.readouterr().out
    assert len(found) == 4 and all(name in printed for name in found)
    for name, errors in found.items():
        wide, low, own = (errors[way] for way in ("bfloat16", "int8, rows in bfloat16", "int8, rows in float32"))
        # Half a step of 254 over some three deviations, and over the more that t has; half a step of eight bits.
        assert 0.005 < own < (0.02 if "normal" in name else 0.06) and 0.001 < wide < 0.006
        assert max(own, wide) < low < own + wide


def test_text_in_a_process_of_its_own() -> None:
    figures = compare.run(text, SHORT)
    found = figures["ours"]
    assert found["prefill_tokens_per_second"] * found["time_to_first_token"] == pytest.approx(8)
    assert found["compile_seconds"] > 0.1 and found["peak_bytes"] > 1e8
    assert found["checkout"] == str(ROOT)
    table = compare.table(text, SHORT, figures)
    assert all(label in table for label, *_ in (*text.ROWS, *compare.COMMON_ROWS))


OLDER = """
import time
from dataclasses import dataclass
from types import SimpleNamespace

@dataclass(frozen=True)
class Bench:
    shape: str
    prompt: int
    new: int
    speech: bool
    speculative: bool

def ours(bench, directory):
    assert (directory / "config.json").is_file()
    print("whatever a library prints")
    def repeat():
        return {"first": bench.prompt, "others": 1 + bench.speech}
    return SimpleNamespace(repeat=repeat, memory=lambda: None, about={"device": "theirs"})

def kind(bench):
    return SimpleNamespace(ours=ours)
"""


def test_an_older_checkout_is_measured_beside_this_one(tmp_path: Path) -> None:
    for name, source in (("omni_jax/__init__.py", "__version__ = '0'"), ("scripts/bench_worker.py", OLDER)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    (tmp_path / "scripts" / "bench.py").write_text("")
    options = replace(SHORT, run=replace(SHORT.run, beside=tmp_path))
    figures = compare.run(text, options)
    assert list(figures) == ["ours", "beside"]
    beside = figures["beside"]
    assert beside["checkout"] == str(tmp_path.resolve()) and beside["device"] == "theirs"
    assert beside["time_to_first_token"] == 8 and beside["decode_tokens_per_second"] == 3
    head, line = compare.table(text, options, figures).splitlines()[1:5:3]
    ratio = figures["ours"]["decode_tokens_per_second"] / 3
    assert head.endswith("ours / beside") and float(line.split()[-1]) == pytest.approx(ratio, rel=1e-2)


def test_this_form_of_checkout_is_measured_beside_itself() -> None:
    options = replace(SHORT, run=replace(SHORT.run, beside=ROOT))
    found = compare.run(text, options)["beside"]
    assert found["prefill_tokens_per_second"] * found["time_to_first_token"] == pytest.approx(8)


@pytest.mark.parametrize("found, complaint", [((), "no checkout"), (("omni_jax",), "cannot be measured")])
def test_a_folder_that_is_no_checkout_is_refused(found: tuple, complaint: str, tmp_path: Path) -> None:
    for name in found:
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=complaint):
        compare.run(text, replace(SHORT, run=Run(repetitions=1, beside=tmp_path)))


@pytest.mark.parametrize("system", ["ours", "theirs"])
def test_speech(system: str, request: pytest.FixtureRequest) -> None:
    seconds = request.getfixturevalue(system).repeat()
    assert min(seconds.values()) > 0
    assert (seconds["first_audio"] < seconds["reply"]) == (system == "ours"), "only ours streams"
    figures = speech.figures(SPEECH, seconds)
    sound = SPEECH.batch * SPEECH.frames / 12.5
    assert figures["code2wav_factor"] * sound == pytest.approx(seconds["code2wav"])
    assert figures["speech_factor"] == pytest.approx(figures["talker_factor"] + figures["code2wav_factor"])
    assert figures["frames_per_second"] * seconds["other_frames"] == pytest.approx(SPEECH.batch * (SPEECH.frames - 1))


@pytest.mark.parametrize("system", [drafting.ours, drafting.theirs])
def test_drafting(system: Callable, checkpoints: Callable[[str], Path]) -> None:
    """The repetition itself raises if a width gives other tokens than plain decoding."""
    options = Text(prompt=8, new=18, batch=2, run=Run(repetitions=1, threads=1))
    seconds = system(options, checkpoints("tiny")).repeat()
    figures = drafting.figures(options, seconds)
    assert figures["oracle_8"] * seconds["oracle_8"] == pytest.approx(2 * 17)
    assert figures["gain_16"] == pytest.approx(seconds["plain"] / seconds["oracle_16"])
    assert all(key in figures for _, key, *_ in drafting.ROWS)


@pytest.mark.parametrize("system", [train.ours, train.theirs])
def test_training(system: Callable, checkpoints: Callable[[str], Path]) -> None:
    options = Train(tokens=8, batch=2, run=Run(repetitions=1, threads=1))
    parts = system(options, checkpoints("tiny")).repeat()
    figures = train.figures(options, parts)
    assert figures["tokens_per_second"] * parts["kept"] == pytest.approx(16)
    assert figures["remat_tokens_per_second"] * parts["remat"] == pytest.approx(16)
    if system is train.ours:
        assert 0 < figures["remat_temporary_bytes"] < figures["temporary_bytes"]
    about = {"compile_seconds": 0.0, "peak_bytes": 1}
    lines = compare.table(train, options, {"ours": figures | about}).splitlines()
    assert (lines[4].split()[-1] == "-") == (system is train.theirs), "only ours knows its temporaries"


def test_too_few_frames_of_ours_are_an_error(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    _, requests = ours.stream()
    speakers = ours._speakers
    monkeypatch.setattr(ours, "_speakers", lambda frames: speakers(frames - 1))
    with pytest.raises(RuntimeError, match=r"frames: \[3, 3\] produced, \[4, 4\] expected"):
        ours.speak(requests, SPEECH.frames)
    with pytest.raises(RuntimeError, match="samples"):
        ours.stream()


def test_too_few_frames_of_theirs_are_an_error(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs.reply()
    speak = theirs.speak
    monkeypatch.setattr(theirs, "speak", lambda **settings: speak(**{**settings, "max_new_tokens": SPEECH.frames}))
    with pytest.raises(RuntimeError, match=r"frames: \(2, 3\) produced, \(2, 4\) expected"):
        theirs.codes(SPEECH.frames)


def test_a_measured_process_that_fails_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="process that measures 'ours' failed"):
        Worker("ours", text, Text(), tmp_path)


@pytest.mark.parametrize(
    "options, wrong",
    [(Speech, {"frames": 1}), (Run, {"repetitions": 0}), (Text, {"prompt": 7}), (Scaling, {"batch": 0})],
)
def test_options_that_give_no_figures_are_refused(options: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give at least"):
        options(**wrong)


def test_a_file_that_could_not_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder does not exist"):
        Run(json=tmp_path / "no" / "figures.json")


def test_the_json_holds_options_and_figures(tmp_path: Path) -> None:
    compare.write_json(tmp_path / "figures.json", SHORT, {"ours": {"rate": 1.5}})
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["figures"] == {"ours": {"rate": 1.5}} and found["options"]["run"]["shape"] == "tiny"
