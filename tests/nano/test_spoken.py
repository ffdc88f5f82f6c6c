"""The judged speech of the stage evaluate: what is kept and what is read, examples, and what must be installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_jax.errors import InputError
from scripts.nano import spoken
from scripts.nano.__main__ import Evaluate, evaluate
from scripts.nano.evaluation import Evaluator
from scripts.nano.rows import assistant, user
from scripts.nano.spoken import PROMPTS, SPOKEN, evaluate_speech, read_speech, spoken_rows


def write_output(output: Path) -> Path:
    """Rows of all senses that are spoken, with one sentence that the Talker was trained to say, and a model."""
    (output / "rows").mkdir()
    (output / "speech").mkdir()
    for sense in SPOKEN:
        rows = [
            [user(f"{sense} {i}?"), assistant("It is two." if i < PROMPTS + 3 else "It is six.")] for i in range(20)
        ]
        text = "".join(json.dumps({"sense": sense, "messages": row, "answer": ""}) + "\n" for row in rows)
        (output / "rows" / f"{sense}.test.jsonl").write_text(text)
    (output / "rows" / "digit.train.jsonl").write_text(json.dumps({"messages": [user("?"), assistant("It is two.")]}))
    said = [{"text": "It is two.", "split": "train"}, {"text": "It is six.", "split": "test"}]
    (output / "speech" / "speech.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    (model := output / "model").mkdir()
    (model / "config.json").write_text("{}")
    return model


def test_rows_are_added_whose_answers_were_not_trained(tmp_path: Path) -> None:
    write_output(tmp_path)
    rows = [row for row in spoken_rows(tmp_path, None) if row["sense"] == "add"]
    said = [row["messages"][-1]["content"] for row in rows]
    assert said == ["It is two."] * PROMPTS + ["It is six."] * 7
    (tmp_path / "aloud").mkdir()
    (tmp_path / "aloud" / "aloud.jsonl").write_text(json.dumps({"messages": [assistant("It is six.")]}) + "\n")
    assert len([row for row in spoken_rows(tmp_path, None) if row["sense"] == "add"]) == PROMPTS, "lists are trained on"
    (tmp_path / "aloud" / "aloud.jsonl").unlink()
    (tmp_path / "spoken").mkdir()
    (tmp_path / "spoken" / "train.jsonl").write_text(json.dumps({"messages": [assistant("It is six.")]}) + "\n")
    assert len([row for row in spoken_rows(tmp_path, None) if row["sense"] == "add"]) == PROMPTS, "so are answers"


def test_transcripts_are_kept_for_the_sentences_that_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jiwer")
    pytest.importorskip("soundfile")
    evaluator, asked = Evaluator(write_output(tmp_path), tmp_path), []

    def speak(evaluator: Evaluator, conversations: list, speaker: str) -> list:
        asked.append(speaker)
        return [
            ("It is six." if i % 2 else "It is two.", np.zeros(2400, np.float32)) for i in range(len(conversations))
        ]

    monkeypatch.setattr(spoken, "_spoken", speak)
    monkeypatch.setattr(spoken, "synthesised", lambda text, voice, rate: np.zeros(2400, np.float32))
    monkeypatch.setattr(spoken, "recogniser", lambda sentences: lambda wave, rate: "it is two")
    assert read_speech(evaluator, tmp_path)["speakers"] == {}
    results = evaluate_speech(evaluator, tmp_path)
    assert evaluate_speech(evaluator, tmp_path) == results == read_speech(evaluator, tmp_path)
    assert sorted(asked) == ["chelsie", "ethan"] == sorted(results["speakers"])
    counts = results["speakers"]["ethan"]
    assert (counts["said"]["sentences"], counts["said"]["strings_right"]) == (170, 85)
    assert (counts["new"]["sentences"], counts["new"]["strings_right"]) == (85, 0)
    assert len(results["examples"]) == 2 * len(SPOKEN)
    assert all((evaluator.folder / example["file"]).exists() for example in results["examples"])
    # A recogniser that knows other sentences hears otherwise.
    (tmp_path / "rows" / "digit.train.jsonl").write_text(json.dumps({"messages": [user("?"), assistant("Ten.")]}))
    assert read_speech(evaluator, tmp_path)["speakers"] == {}


def test_what_is_missing_is_said_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(InputError, match="pip install 'pocketsphinx"):
        evaluate(Evaluate(output=tmp_path, model=(model := write_output(tmp_path))))
    (tmp_path / "speech" / "speech.jsonl").unlink()
    with pytest.raises(InputError, match="speech.jsonl is missing; run the stage codec first"):
        evaluate(Evaluate(output=tmp_path, model=model))
    assert not (tmp_path / "evaluation").exists()
