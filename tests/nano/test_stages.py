"""The command line of the stages: what it refuses, and how a stage is paused."""

import sys
import time
from functools import partial
from pathlib import Path

import pytest

from omni_jax import process
from omni_jax.errors import InputError
from omni_jax.process import BAD_INPUT, INTERRUPTED, finishing
from scripts.nano import __main__ as stages
from scripts.nano import thinker
from scripts.nano.rows import rows_path
from scripts.nano.senses import senses


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["nano", *arguments])
    return stages.main()


def test_a_sense_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = "--output", str(tmp_path)
    assert run(monkeypatch, "data", *output, "--senses", "count", "smell") == BAD_INPUT
    assert "there is no sense 'smell'; the senses are count, add" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()
    assert run(monkeypatch, "data", *output, "--senses", "count", "--scale", "0.002", "--workers", "1") == 0
    assert "count: 6 rows to train on, 1 to test" in capsys.readouterr().out
    assert run(monkeypatch, "data", *output, "--senses", "count") == BAD_INPUT
    assert "holds 6 rows, not 3,000" in capsys.readouterr().err


def test_what_needs_voices_is_known(tmp_path: Path) -> None:
    needing = {need: [one.name for one in senses(tmp_path) if need in one.needs] for need in ("voices", "handwriting")}
    assert needing == {
        "voices": ["digit", "digits", "silence", "heard", "red", "same"],
        "handwriting": ["written", "same", "shown"],
    }


def test_a_stage_is_paused_after_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ended = []

    def trains(*_: object, **__: object) -> None:
        with finishing():
            end = time.monotonic() + 30
            while not process.interrupted() and time.monotonic() < end:
                time.sleep(0.01)
            ended.append(process.interrupted())

    handler = process.signal.getsignal(process.signal.SIGTERM)
    monkeypatch.setattr(thinker, "train_thinker", trains)
    monkeypatch.setattr(process, "_process", process._Process())
    try:
        given = ("--output", str(tmp_path), "--senses", "count", "--seconds", "0.2")
        assert run(monkeypatch, "thinker", *given) == INTERRUPTED
    finally:
        process.signal.signal(process.signal.SIGTERM, handler)
    assert ended == [True] and "paused; the same command goes on" in capsys.readouterr().err


def test_words_go_on_from_their_own_beginning_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, seed = [], "0"

    def begin(directory: Path, *_: object) -> Path:
        (directory / "begin").mkdir(exist_ok=True)
        (directory / "begin" / "config.json").write_text(seed)
        return directory / "begin"

    monkeypatch.setattr(thinker, "trained_by", trained.append)
    monkeypatch.setattr(thinker, "beginning", begin)
    for sense in thinker.TEXT:
        path = rows_path(tmp_path, sense, "train")
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"messages": []}\n')
    how = thinker.How(4, 1e-3, 0, 1)
    for _ in range(2):
        thinker.train_words(tmp_path, how)
        (tmp_path / "words").mkdir(exist_ok=True)
    seed = "1"
    with pytest.raises(InputError, match="words is outdated: begin changed; delete .*words to make it anew"):
        thinker.train_words(tmp_path, how)
    path.write_text("{}\n")
    with pytest.raises(InputError, match="begin is outdated: rows changed; delete .*begin and .*words to make it anew"):
        thinker.train_words(tmp_path, how)
    assert [recipe.run.model for recipe in trained] == [tmp_path / "begin"] * 2


def test_each_stage_goes_on_from_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setattr(thinker, "trained_by", trained.append)
    for sense in (*thinker.PICTURES, "digit"):
        path = rows_path(tmp_path, sense, "train")
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"messages": []}\n')
    how = thinker.How(4, 1e-3, 0, 1)
    for stage, before, train in (
        ("look", "sight", partial(thinker.train_look, tmp_path, how)),
        ("mixed", "look", partial(thinker.train_mixed, tmp_path, (*thinker.PICTURES, "digit"), how)),
        ("thinker", "mixed", partial(thinker.train_thinker, tmp_path, (*thinker.PICTURES, "digit"), how)),
    ):
        with pytest.raises(InputError, match=f"{before}/model is missing; run the stage {before} first"):
            train()
        (tmp_path / before / "model").mkdir(parents=True)
        train()
        assert trained[-1].run.model == tmp_path / before / "model" and trained[-1].run.output == tmp_path / stage
        (tmp_path / stage).mkdir()
        (config := tmp_path / before / "model" / "config.json").write_text("{}")
        with pytest.raises(InputError, match=f"{stage} is outdated: {before}/model changed; delete .*{stage} to make"):
            train()
        config.unlink()
    look, whole, last = trained
    path = rows_path(tmp_path / "again", "digit", "train")
    path.parent.mkdir(parents=True)
    path.write_text('{"messages": []}\n')
    assert look.train_vision and not look.train_audio and whole.train_vision and whole.train_audio
    assert set(whole.run.data) - set(look.run.data) == {rows_path(tmp_path, "digit", "train")}
    assert last.run.data == (tmp_path / "mixture" / "rows.jsonl",) and last.train_vision and last.train_audio
    assert last.optimizer.final_ratio < whole.optimizer.final_ratio
    (tmp_path / "kept").mkdir()
    thinker.train_thinker(tmp_path / "again", ("digit",), how, begun=tmp_path / "kept")
    assert trained[-1].run.model == tmp_path / "kept"
    twice = {file for file in whole.run.data if whole.run.data.count(file) == 2}
    assert twice == {rows_path(tmp_path, "compare", "train")}
