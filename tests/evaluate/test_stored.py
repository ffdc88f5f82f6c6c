"""Folders of results that anybody may have written to."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate import plots
from omni_jax.evaluate.data import Dataset, Sample
from omni_jax.evaluate.report import current_results, summary_of, write_report
from omni_jax.evaluate.run import Results, claim_directory
from omni_jax.evaluate.stored import read_all
from tests.helpers.commands import OPAQUE
from tests.helpers.datasets import ALONE, SAMPLES, result

SPOKEN = {"audio_seconds": 1.0, "share_seconds": 1.0, "compiled": 0}


def changed(**fields: Any) -> dict:
    return {**result(SAMPLES[3]), **fields}


def with_stats(**fields: Any) -> dict:
    good = result(SAMPLES[3])
    (turn,) = good["turns"]
    stats = {name: value for name, value in {**turn["stats"], **fields}.items() if value is not None}
    return good | {"turns": [turn | {"stats": stats}]}


def test_what_runs_write_is_read(tmp_path: Path) -> None:
    good = [
        result(SAMPLES[3]),
        {"id": "4", "category": "", "scores": {}, "error": "why", "media": "00"},
        {"id": "5", "category": "", "scores": {"log_likelihood": float("-inf"), "tokens": 3}},
        {"id": "6", "category": "", "scores": {"word_errors": 0.0, "words": 0.0, "log_likelihood": -1e300}},
        with_stats(**SPOKEN),
        changed(more="fields that later versions may add"),
        changed(id="\udc80"),
    ]
    with Results(tmp_path, {}, ALONE) as written:
        for one in good:
            written.add(one)
    assert read_all(tmp_path) == good


@pytest.mark.parametrize("line, why", [
    ("[]", "the result is of type list"),
    ('"1"', "the result is of type str"),
    ("17", "the result is of type int"),
    ('{"id": "3"}', "the result has no 'category'"),
    (changed(id=3), "'id' of the result is of type int"),
    (changed(category=None), "'category' of the result is of type NoneType"),
    (changed(scores=[1]), "'scores' of the result is of type list"),
    (changed(scores={"exact": "1"}), "'exact' of 'scores' is of type str"),
    (changed(scores={"exact": True}), "'exact' of 'scores' is of type bool"),
    (changed(scores={"exact": [1]}), "'exact' of 'scores' is of type list"),
    (changed(error={}), "'error' of the result is of type dict"),
    (changed(media=1), "'media' of the result is of type int"),
    (changed(turns="no"), "'turns' of the result is of type str"),
    (changed(turns=["no"]), "a turn is of type str"),
    (changed(turns=[{}]), "a turn has no 'text'"),
    (changed(turns=[{"text": "a", "token_ids": []}]), "a turn has no 'stats'"),
    (changed(turns=[{"text": "a", "token_ids": [], "stats": []}]), "'stats' of a turn is of type list"),
    (with_stats(new_tokens=None), "'stats' has no 'new_tokens'"),
    (with_stats(new_tokens="9"), "'new_tokens' of 'stats' is of type str"),
    (with_stats(finish_reason=1), "'finish_reason' of 'stats' is of type int"),
    (with_stats(round_tokens=None), "'stats' has no 'round_tokens'"),
    (with_stats(round_most=["4"]), "'round_most' holds something that is no number"),
    (with_stats(tokens_per_round="1"), "'tokens_per_round' of 'stats' is of type str"),
    (with_stats(audio_seconds=1.0), "'stats' has no 'share_seconds'"),
    (changed(scores={"word_errors": 1.0}), "'scores' has one of 'word_errors' and 'words', which go together"),
    (changed(scores={"characters": 1.0}), "one of 'character_errors' and 'characters'"),
    (changed(scores={"exact": 10**310}), "'exact' is or holds 1000000000"),
    (changed(scores={"exact": -(10**310)}), "'exact' is or holds 1000000000"),
    (changed(scores={"words": -3, "word_errors": 0}), "'words' is or holds -3, which is no amount"),
    (changed(scores={"log_likelihood": -1.0, "tokens": float("nan")}), "'tokens' is or holds nan"),
    (with_stats(new_tokens=-1), "'new_tokens' is or holds -1, which is no amount"),
    (with_stats(new_tokens=10**310), "'new_tokens' is or holds 1000"),
    (with_stats(round_tokens=[1]), "'round_tokens' and 'round_most' are of unequal length"),
    (with_stats(round_tokens=[-1]), "'round_tokens' is or holds -1"),
    (with_stats(round_tokens=[10**310]), "'round_tokens' is or holds 1000"),
    (with_stats(round_most=[[1]]), "'round_most' holds something that is no number"),
    (with_stats(tokens_per_round=float("nan")), "'tokens_per_round' is or holds nan"),
    (with_stats(**SPOKEN | {"share_seconds": float("nan")}), "'share_seconds' is or holds nan"),
    (with_stats(**SPOKEN | {"audio_seconds": float("inf")}), "'audio_seconds' is or holds inf"),
    (with_stats(**SPOKEN | {"compiled": -1}), "'compiled' is or holds -1"),
    ('{"id": "1", "id": "2"}', "occurs twice"),
    ('{"id": ' + "[" * 100_000, "nested too deep"),
    ('{"id": ' + "9" * 5000 + "}", "5000 digits"),
    ("\x00", "no valid JSON"),
], ids=lambda value: str(value)[:50])  # fmt: skip
def test_lines_that_are_no_results(line: Any, why: str, tmp_path: Path) -> None:
    with Results(tmp_path, {}, ALONE) as written:
        written.add(result(SAMPLES[1]))
    file = tmp_path / "results-00000.jsonl"
    file.write_text(file.read_text() + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(InputError) as raised:
        claim_directory(tmp_path, {})
    message = str(raised.value)
    assert f"{file}:2 is damaged (" in message and why in message and "remove the line, and its sample" in message
    assert not OPAQUE.search(message)


def test_blank_lines_and_other_files_are_passed_over(tmp_path: Path) -> None:
    with Results(tmp_path, {}, ALONE) as written:
        written.add(result(SAMPLES[1]))
    file = tmp_path / "results-00000.jsonl"
    (tmp_path / "results-old.jsonl").write_text(file.read_text() + "no result\n")
    file.write_text(f"\n{file.read_text()} \n\r\n")
    claim_directory(tmp_path, {})
    assert read_all(tmp_path) == [result(SAMPLES[1])]
    file.unlink()
    (tmp_path / "run.json").unlink()
    claim_directory(tmp_path, {})


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [_folder, os.mkfifo], ids=["folder", "fifo"])
@pytest.mark.parametrize("name", ["run.json", "report.md", "summary.json", "lengths.png", "results-00000.jsonl"])
def test_what_is_no_file_where_one_must_be(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} is not a regular file.*choose another directory"):
        claim_directory(tmp_path, {})


@pytest.mark.parametrize("text, why", [
    ("[]", "holds no JSON object"),
    ("null", "holds no JSON object"),
    ("", "no valid JSON"),
    ("{", "no valid JSON"),
    ('{"seed": 1}', "holds another run"),
    ('{"a": ' + "[" * 100_000, "nested too deep"),
    ("\udc80", "UTF-8"),
])  # fmt: skip
def test_a_run_that_does_not_say_what_it_is(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=rf"run\.json.*{why}|{why}.*choose another"):
        claim_directory(tmp_path, {})


def test_samples_that_failed_are_done_again_and_written_once(tmp_path: Path) -> None:
    good, failed = result(SAMPLES[0]), {"id": "1", "category": "b", "scores": {}, "error": "no"}
    with Results(tmp_path, {}, ALONE) as written:
        written.add(good)
        written.add(failed)
    before = (tmp_path / "results-00000.jsonl").read_bytes()
    for other in (dict(failed), failed | {"error": "never"}):
        with Results(tmp_path, {}, ALONE) as written:
            assert [sample.id for sample in written.remaining(SAMPLES[:3])] == ["1", "2"]
            written.add(other)
        after = (tmp_path / "results-00000.jsonl").read_bytes()
        assert (after == before) == (other == failed)
    with Results(tmp_path, {}, ALONE) as written:
        written.add(result(SAMPLES[1]))
        written.add(result(SAMPLES[2]))
    with Results(tmp_path, {}, ALONE) as written:
        assert not written.remaining(SAMPLES[:3])
    assert current_results(Dataset(SAMPLES[:3], [], ""), read_all(tmp_path)) == [
        result(sample) for sample in SAMPLES[:3]
    ]


def test_of_several_results_the_one_that_counts() -> None:
    sample = Sample("a", [], media="new")
    score = {"id": "a", "category": "", "scores": {"exact": 1.0}}
    old, new, failed = score | {"media": "old"}, score | {"media": "new"}, score | {"media": "new", "error": "no"}
    stale = score | {"media": "old", "error": "no"}
    for lines, want in (
        ([old], []),
        ([new, old], [new]),
        ([new, failed], [new]),
        ([failed, new], [new]),
        ([failed, old], [failed]),
        ([old, stale], []),
        ([failed, failed | {"error": "never"}], [failed | {"error": "never"}]),
        ([score], []),
        ([score | {"id": "b"}], []),
    ):
        assert current_results(Dataset([sample], [], ""), lines) == want


CATEGORIES = ["$\\frac$", "$x^", "a_b{", "\x00\x07", "x" * 100_000, "你好", "|", "_", "\n"]


@pytest.mark.parametrize("name", CATEGORIES, ids=lambda name: repr(name)[:20])
def test_categories_of_any_name_are_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    samples = [Sample("0", [], category=name), Sample("1", [], category="b")]
    found = [result(SAMPLES[i]) | {"category": sample.category} for i, sample in enumerate(samples)]
    dataset = Dataset(samples, [], "")
    write_report(tmp_path, summary_of("t", dataset, found), dataset, found, {"task": "t"})
    assert (tmp_path / "categories.png").stat().st_size > 1000 and not capsys.readouterr().err
    assert "by category" in (tmp_path / "report.md").read_text()


def test_categories_whose_names_begin_alike_are_all_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn, bars = [], plots._bars
    monkeypatch.setattr(plots, "_bars", lambda axes, some: (drawn.extend(some), bars(axes, some)))
    plots.draw_plots(tmp_path, [], {"x" * 90 + end: {"exact": float(end)} for end in "01"})
    assert [height for _, height in drawn] == [0.0, 1.0]


def test_many_categories_are_drawn_in_part(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    found = [result(SAMPLES[1]) | {"category": f"{i}", "id": f"{i}"} for i in range(500)]
    dataset = Dataset([Sample(one["id"], [], category=one["category"]) for one in found], [], "")
    write_report(tmp_path, summary_of("t", dataset, found), dataset, found, {"task": "t"})
    assert image.open(tmp_path / "categories.png").height <= 1800
    assert "| 499 | 1 |" in (tmp_path / "report.md").read_text()


def test_a_plot_that_cannot_be_drawn_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    lost = result(SAMPLES[1])
    lost["turns"][0]["stats"]["tokens_per_round"] = float("nan")
    dataset = Dataset(SAMPLES[1:2], [], "")
    write_report(tmp_path, summary_of("t", dataset, [lost]), dataset, [lost], {"task": "t"})
    assert "accepted.png cannot be drawn" in capsys.readouterr().err
    report = (tmp_path / "report.md").read_text()
    assert "accepted.png" not in report and "lengths.png" in report
