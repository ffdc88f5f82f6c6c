"""The stage card: what falls short and what is missing is said, and figures are found where stages leave them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from omni_jax import loading
from omni_jax.errors import InputError
from omni_jax.weights.locate import DRAFTERS, NANO
from omni_jax.weights.manifest import identity
from scripts.nano import figures as found
from scripts.nano.ablation import ABLATIONS
from scripts.nano.card import COMPARED, REMOVED, SENSES, SOUNDS, text_of
from scripts.nano.evaluation import Evaluator, questions, rows_for_test
from scripts.nano.figures import STAGES, figures_of, sizes_of
from scripts.nano.robustness import PHOTOGRAPHS, conditions
from scripts.nano.rows import assistant, user
from scripts.nano.senses import senses
from scripts.nano.spoken import COUNTED

DOCS = Path(__file__).resolve().parents[2] / "docs"
GOOD = {"samples": 100, "right": 99, "verbatim": 98, "failures": []}
NARROWER = {"samples": 100, "right": 98}
HEARD = {"voices": {name: [25, 25] for name in (*SOUNDS, "flite-rms")}}
COUNTS = {
    "sentences": 90, "words": 300, "errors": 30, "numbers": 50, "numbers_heard": 49, "strings": 40, "strings_right": 38,
    "seconds": 60.0,
}  # fmt: skip


def complete() -> dict[str, Any]:
    """Figures of which nothing is missing or falls short."""
    sizes = {"thinker": {"parameters": 4_000_000}, "model": {"parameters": 4_000_000, "bytes": 9_000_000}}
    return {
        "seed": 3,
        "sizes": sizes | {kind: {"parameters": 300_000, "bytes": 600_000} for kind in DRAFTERS},
        "senses": dict.fromkeys(SENSES, GOOD) | {"silence": GOOD | HEARD},
        **{held: dict.fromkeys(SENSES, NARROWER) | {"silence": NARROWER | HEARD} for held in ("bfloat16", "int8")},
        "robust": {name: {"samples": 100, "right": 90} for name in (*conditions(), PHOTOGRAPHS)},
        "without": {name: {"sense": one.sense, "samples": 100, "right": 9} for name, one in ABLATIONS.items()},
        "speech": {
            "recogniser": "R",
            "examples": [],
            "speakers": dict.fromkeys(("ethan", "chelsie"), dict.fromkeys(COUNTED, COUNTS)),
        },
        "talker": "held sentences: 70 %",
        "stages": {stage: {"steps": 4000.0, "first": 6.5, "last": 0.1234, "seconds": 3000} for stage in STAGES},
        "evaluated": 600.0,
    }


def test_goals_are_of_all_senses(tmp_path: Path) -> None:
    assert sorted(SENSES) == sorted(sense.name for sense in senses(tmp_path))
    assert {*COMPARED} == {*COUNTED} and {*REMOVED} == {*ABLATIONS}


def test_a_complete_card_says_so() -> None:
    text = text_of(complete())
    assert "Everything reaches its goal." in text and "Not measured" not in text and "$" not in text
    assert "4.0 million" in text and "seed 3" in text and "loss-codec.png" in text and "9,000,000" in text
    assert "held sentences: 70 %" in text and "95.0 %" in text and "| 50 |" in text


@pytest.mark.parametrize(
    ("name", "inner", "said"),
    [
        ("senses", "digits", "digits"),
        ("robust", "8 kHz", "8 kHz"),
        ("stages", "dflash", "the training of dflash"),
        ("sizes", "eagle3", "the size of eagle3"),
        ("without", "window", "the model without window"),
        ("bfloat16", "move", "move in bfloat16"),
        ("int8", "move", "move in int8"),
    ],
)
def test_what_was_not_measured_is_said(name: str, inner: str, said: str) -> None:
    figures = complete()
    del figures[name][inner]
    text = text_of(figures)
    assert f"Not measured: {said}." in text and "Everything" not in text.split("## How")[0]


def test_missing_speech_is_said() -> None:
    figures = complete() | {"talker": None, "bfloat16": {}}
    del figures["speech"]["speakers"]["ethan"]
    text = text_of(figures)
    assert "Not measured: ethan's speech, anything in bfloat16, the Talker's held sentences." in text


def test_the_card_says_what_falls_short() -> None:
    figures = complete()
    figures["senses"]["digit"] = GOOD | {"right": 80, "voices": {"flite-rms": [50, 60], "recorded-lucas": [30, 40]}}
    figures["bfloat16"]["digit"] = {"samples": 100, "right": 70}
    figures["int8"]["digits"] = {"samples": 100, "right": 60}
    figures["robust"]["8 kHz"] = {"samples": 100, "right": 84}
    figures["speech"]["speakers"]["ethan"] = dict.fromkeys(COUNTED, COUNTS | {"numbers_heard": 30})
    figures["senses"]["silence"] = GOOD | {"voices": HEARD["voices"] | {"beep": [2, 25]}}
    text = text_of(figures)
    behind = next(line for line in text.splitlines() if line.startswith("Short of its goal"))
    assert "digit (80.0 % of 95 %)" in behind and "8 kHz (84.0 % of 85 %)" in behind
    assert "digit in bfloat16 (loses 10.0 points of 1)" in behind and "digits in int8 (loses" in behind
    assert "ethan's speech (60.0 % of numbers heard, 10.0 % of words wrong)" in behind
    assert "silence (beep, music) (54.0 % of 85 %)" in behind and "silence (silence" not in behind
    assert "(voices)" not in behind and "16 kHz" not in behind and "chelsie" not in behind
    assert "| digit | recorded people | 75.0 %" in text and "| digit | synthetic voices | 83.3 %" in text
    assert "| 50 of 60 |" in text


def write_output(output: Path) -> Path:
    """What stages leave: rows, metrics and times, and an exported model."""
    (output / "rows").mkdir()
    for sense in ("add", "spell"):
        row = {"sense": sense, "messages": [user("What?"), assistant("Two.")], "answer": "two"}
        (output / "rows" / f"{sense}.test.jsonl").write_text(json.dumps(row) + "\n")
    for stage in ("thinker", "drafters/dflash"):
        (output / stage).mkdir(parents=True)
        (output / stage / "metrics.csv").write_text("step,loss\n10,4\n20,2\n")
        (output / stage / "timings.csv").write_text("step,seconds,tokens_per_second\n10,30,5\n20,12.4,5\n")
    (output / "codec.csv").write_text("0,39,0.8,2.2\n11,60,0.2,1002.2\n")
    (model := output / "exported").mkdir()
    (model / "config.json").write_text("{}")
    return model


def test_figures_are_of_this_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_output(tmp_path)
    monkeypatch.setattr(found, "sizes_of", lambda model, output: {})
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text('{"other": 1}')
    with pytest.raises(InputError, match="run the stage evaluate first"):
        figures_of(tmp_path, model, 0)
    asked = questions(rows_for_test(tmp_path, "add", None), tmp_path)
    evaluator = Evaluator(model, tmp_path)
    for one, sense, reply in (
        (evaluator, "add", "Two."),
        (Evaluator(other, tmp_path), "spell", "Two."),
        (Evaluator(model, tmp_path, 1), "spell", "Two."),
        (Evaluator(model, tmp_path, None, "bfloat16"), "add", "Three."),
        (Evaluator(model, tmp_path, None, "int8"), "add", "Two."),
    ):
        monkeypatch.setattr(one, "answers", lambda conversations, reply=reply: [reply] * len(conversations))
        one.replies(sense, asked)
    figures = figures_of(tmp_path, model, 0)
    assert {name: one["right"] for name, one in figures["senses"].items()} == {"add": 1}
    assert figures["bfloat16"] == {"add": {"samples": 1, "right": 0}} and figures["int8"]["add"]["right"] == 1
    assert figures["robust"] == {} and figures["speech"]["speakers"] == {} and figures["talker"] is None
    assert figures["stages"] == {
        "thinker": {"steps": 20, "first": 4, "last": 3, "seconds": 42},
        "dflash": {"steps": 20, "first": 4, "last": 3, "seconds": 42},
        "codec": {"steps": 11, "first": 0.8, "last": 0.5, "seconds": 60},
    }


def test_sizes_are_of_parts_files_and_drafters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"thinker": {"a": np.zeros((2, 3)), "b": {"c": np.zeros(4)}}, "talker": {"a": np.zeros(5)}}
    monkeypatch.setattr(loading, "load_lazily", lambda model: type("Lazy", (), {"params": params}))
    (tmp_path / "dflash").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"1234567")
    (tmp_path / "dflash" / "config.json").write_text("{}")
    save_file({"a": np.zeros((3, 3), np.float16)}, tmp_path / "dflash" / "model.safetensors")
    sizes = sizes_of(tmp_path, tmp_path)
    assert sizes["thinker"] == {"parameters": 10} and sizes["model"] == {"parameters": 15, "bytes": 7}
    assert sizes["dflash"]["parameters"] == 9 and sizes["dflash"]["bytes"] > 18 and "eagle3" not in sizes


def test_the_card_is_that_of_its_figures() -> None:
    assert (DOCS / "nano.md").read_text() == text_of(json.loads((DOCS / "nano" / "figures.json").read_text()))


def test_the_card_is_that_of_the_shipped_weights() -> None:
    figures = json.loads((DOCS / "nano" / "figures.json").read_text())
    assert figures["model"] == identity(NANO), "run the stages evaluate and card"
