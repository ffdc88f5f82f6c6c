"""The GPU check's sections run here on CPU at tiny shapes, and lose nothing to failures, crashes and the deadline."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest

from scripts.gpu import __main__ as gpu_check
from scripts.gpu import report, sizes, theirs, timing
from scripts.gpu.correct import Finding
from scripts.gpu.sections import SECTIONS
from scripts.gpu.steps import Fact, Step, once, run_steps
from scripts.gpu.timing import Timing


def ran(name: str, folder: Path) -> dict[str, Any]:
    """A section at tiny shape, in this process."""
    return run_steps(SECTIONS[name].steps("tiny"), folder / "running.json", time.time() + 3600)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, measured",
    [
        (
            "text",
            {
                "decode 1 rows, 256 slots",
                "decode 2 rows, 256 slots",
                "prefill 1 x 16",
                "piece 1 x 32 after 200",
                "verify 1 x 4, 256 slots",
            },
        ),
        ("kernel_text", {"decode 1 rows, 256 slots", "decode 2 rows, 256 slots"}),
        ("speech", {"speech frame, 1 rows", "sound of 1 x 4 frames", "speech prompt 1 x 16"}),
        ("kernel_speech", {"speech frame, 1 rows"}),
        ("int8", {"decode 1 rows, 256 slots, int8 experts", "decode 2 rows, 256 slots, int8 experts"}),
    ],
)
def test_programs_are_measured_and_predicted(name: str, measured: set[str], tmp_path: Path) -> None:
    found = ran(name, tmp_path)
    assert not found["errors"] and not found["left"]
    timings = {one["name"]: one for one in found["timing"]}
    assert timings.keys() == measured
    for one in timings.values():
        assert one["milliseconds"] > 0 and one["expected_ms"] > 0 and one["launches"] > 0 and one["moved_gb"] > 0, one
        assert one["note"] == ""
    table = report.main_table({name.removeprefix("kernel_"): found})
    assert all(cells[3] == f"{float(cells[3]):.2f}" for cells in table[1:])


@pytest.mark.slow
def test_a_reply_is_expected_to_take_what_its_parts_take(tmp_path: Path) -> None:
    found = ran("reply", tmp_path)
    assert not found["errors"]
    timings = {one["name"]: one for one in found["timing"]}
    names = {name for one in timings.values() for name, _ in one["parts"]}
    known = {name: {"expected_ms": 2.0} for name in names}
    assert report.expected_of(timings[sizes.FIRST_AUDIO], known) == 10.0
    assert report.expected_of(timings[sizes.SECOND_OF_SPEECH], known) == pytest.approx(2 * 12.5 * 1.25)
    assert report.expected_of(timings[sizes.FIRST_AUDIO], {}) is None
    assert report.expected_of(timings[sizes.WHOLE_REPLY], known) is None
    # They are names of what the other sections measure.
    tiny = sizes.TINY
    own = {step.name for name in ("text", "speech") for step in SECTIONS[name].steps("tiny")}
    assert names <= own and tiny.reply[0] == tiny.prefill[-1]


@pytest.mark.slow
def test_transformers_is_measured_under_the_same_names(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = ran("theirs", tmp_path)
    assert not found["errors"], found["errors"]
    measured = {one["name"] for one in found["timing"]}
    own = {step.name for name in ("text", "speech") for step in SECTIONS[name].steps("tiny")}
    assert measured <= own | {sizes.FIRST_AUDIO, sizes.SECOND_OF_SPEECH, sizes.WHOLE_REPLY}
    assert {sizes.FIRST_AUDIO, "decode 1 rows, 256 slots", "speech frame, 1 rows"} <= measured


def test_without_transformers_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "find_spec", lambda name: None)
    found = ran("theirs", tmp_path)
    assert not found["errors"] and found["fact"] == [{"name": "not installed", "value": "torch, transformers"}]


@pytest.mark.slow
def test_a_start_is_measured_with_programs_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**gpu_check.ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}.items():
        monkeypatch.setenv(name, value)
    found = ran("start", tmp_path)
    (one,) = found["timing"]
    assert not found["errors"] and one["note"].startswith("0 programs compiled") and one["milliseconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("kernels", "timing"), ("profiles", "profile")])
def test_kernels_and_profiles_run(name: str, kind: str, tmp_path: Path) -> None:
    found = ran(name, tmp_path)
    assert not found["errors"] and not found["left"] and len(found[kind]) >= 2
    assert "ms" in report.section(name, found)


@pytest.mark.parametrize("name", ["correctness", "kernel_correctness"])
def test_checks_are_steps_of_their_own(name: str) -> None:
    steps = SECTIONS[name].steps("full")
    assert len({step.name for step in steps}) == len(steps) >= 3


def test_what_the_judge_cannot_read_is_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("unknown text")

    double = jax.jit(lambda x: 2 * x)
    case, x = timing.Case("double", turns=4, work=3, unit="things/s"), jnp.ones(8)
    good = timing.measure_judged(case, lambda: double.lower(x), lambda: double(x))
    assert good.expected_ms and good.launches and good.rate == pytest.approx(3 / (good.milliseconds / 1e3))
    monkeypatch.setattr(timing, "Judge", fails)
    bad = timing.measure_judged(case, lambda: double.lower(x), lambda: double(x))
    assert bad.milliseconds > 0 and bad.expected_ms is None and "unknown text" in bad.note


def fact(name: str) -> list[Fact]:
    return [Fact(name, "found")]


def test_a_step_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def fails() -> Sequence[Any]:
        raise RuntimeError("out of memory")

    steps = [Step("a", lambda: fact("a")), Step("b", fails), Step("c", lambda: fact("c"))]
    found = run_steps(steps, tmp_path / "x.json", time.time() + 60)
    assert [one["name"] for one in found["fact"]] == ["a", "c"]
    assert found["errors"] == ["b: RuntimeError: out of memory"] and found["left"] == []
    assert json.loads((tmp_path / "x.json").read_text()) == found


def test_a_step_without_enough_time_is_left_and_named(tmp_path: Path) -> None:
    steps = [Step("long", lambda: fact("long"), 100.0), Step("short", lambda: fact("short"), 1.0)]
    found = run_steps(steps, tmp_path / "x.json", time.time() + 50)
    assert [one["name"] for one in found["fact"]] == ["short"] and found["left"] == ["long"]
    assert "**left, no time (text):** long" in report.summary({"text": found})


def test_what_is_made_once_fails_once() -> None:
    calls = []

    def make() -> int:
        calls.append(1)
        raise RuntimeError("no")

    get = once(make)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            get()
    assert len(calls) == 1 and once(lambda: None)() is None


def test_every_section_can_be_asked_for() -> None:
    assert get_args(gpu_check.Name) == tuple(SECTIONS)


def test_a_section_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert gpu_check.check(tmp_path, "tiny", only=("versions",)) == 0
    assert "| jax |" in (tmp_path / "summary.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "summary.md"]


def test_what_a_section_found_outlives_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in its place writes as a section does, then hangs or dies."""
    script = (
        "import os, signal, sys, time; from pathlib import Path; from scripts.gpu.steps import *; "
        "end = lambda: {}; "
        "steps = [Step('a', lambda: [Fact('a', 'found')], 0), Step('b', end, 0), Step('c', end, 0)]; "
        "run_steps(steps, Path(sys.argv[3]), float(sys.argv[4]))"
    )
    monkeypatch.setattr(gpu_check, "RUN_SECTION", script.format("time.sleep(60)"))
    cut = gpu_check.run_apart("text", "tiny", tmp_path, 6.0)
    assert [one["name"] for one in cut["fact"]] == ["a"] and not cut["errors"]
    assert cut["left"] == ["b", "c", "cut off after 6 s in b"]
    monkeypatch.setattr(gpu_check, "RUN_SECTION", script.format("os.kill(os.getpid(), signal.SIGSEGV)"))
    died = gpu_check.run_apart("text", "tiny", tmp_path, 30.0)
    assert [one["name"] for one in died["fact"]] == ["a"] and died["left"] == ["b", "c"]
    assert died["errors"] == [f"the process ended with -{signal.SIGSEGV.value} in b"]


def test_a_section_that_cannot_begin_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "RUN_SECTION", "import no_such_module")
    assert gpu_check.check(tmp_path, "tiny", only=("text", "speech")) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert [found[name]["errors"] for name in ("text", "speech")] == [["the process ended with 1"]] * 2


def test_the_deadline_skips_and_names_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []

    def took(name: str, shape: str, folder: Path, seconds: float) -> dict[str, Any]:
        given.append(seconds)
        now[0] += seconds
        return {"errors": [], "left": []}

    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_check, "run_apart", took)
    assert gpu_check.check(tmp_path, "tiny", minutes=4.0, limit=100.0) == 0
    assert given == [100.0, 100.0, 40.0]
    said = capsys.readouterr().out
    for name in list(SECTIONS)[3:]:
        assert f"**left, no time ({name}):** all of it" in said
    assert f"**left, no time ({list(SECTIONS)[2]})" not in said


def test_the_most_important_sections_come_first() -> None:
    names = list(SECTIONS)
    assert names[:4] == ["versions", "correctness", "text", "speech"] and names[-1] == "profiles"
    assert names.index("reply") < names.index("theirs") < names.index("kernels")
    assert [SECTIONS[name].environment["OMNI_JAX_DECODE_KERNEL"] for name in ("text", "kernel_text")] == ["off", "on"]


def test_full_has_every_program_of_the_table() -> None:
    full = sizes.FULL
    assert {rows for rows, _ in full.decode} == {1, 8, 32, 64} and 8192 in full.prefill
    assert set(full.verify) == {4, 8, 16} and set(full.frames) == {1, 8} and (1, 4) in full.sound
    known = {sizes.decode_name(*c) for c in full.decode} | {sizes.prefill_name(n) for n in full.prefill}
    known |= {sizes.SECOND_OF_SPEECH, sizes.FIRST_AUDIO, sizes.START}
    assert sizes.GOALS.keys() <= known


def test_the_table_has_the_kernel_and_transformers_beside_ours() -> None:
    ours = Timing("decode", 4.0, 1.0, 250.0, "tokens/s", "300 tokens/s", 2.0, 700, 6.3)
    sections_found = {
        "text": {"timing": [timing_dict(ours)]},
        "kernel_text": {"timing": [timing_dict(replace(ours, milliseconds=3.0, expected_ms=2.5))]},
        "theirs": {"timing": [timing_dict(replace(ours, milliseconds=40.0, expected_ms=None))]},
    }
    _, row = report.main_table(sections_found)
    assert row == [
        "decode", "4.000", "2.000", "2.00", "250 tokens/s", "300 tokens/s", "3.000", "2.500", "1.20", "40.000",
        "10.00", 700, "6.30",
    ]  # fmt: skip


def timing_dict(one: Timing) -> dict[str, Any]:
    return {**vars(one), "parts": [list(part) for part in one.parts]}


def test_summary_names_failures() -> None:
    wrong = vars(Finding("moe tiled", float("inf"), 1e-5))
    text = report.markdown({"correctness": {"errors": ["a|b: boom"], "finding": [wrong], "left": ["rope"]}})
    assert "**correctness failed:** a|b: boom" in text and "out of bounds: moe tiled" in text and "| NO |" in text
    assert "(correctness):** rope" in text
    assert report.table("T", [["a", "b"], [1, "x|y"]])[-2] == "| 1 | x/y |"
    assert report.errors({"finding": [{**wrong, "error": float("nan")}]})


def test_the_command_itself_imports_nothing_heavy() -> None:
    command = "import sys, scripts.gpu.__main__; assert not {'jax', 'torch', 'flax'} & sys.modules.keys(), 'heavy'"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=gpu_check.ROOT)
