"""Copies of omni-nano that lack one part: what differs from the whole is that part alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from omni_jax.files import read_object
from omni_jax.weights.model import model_config
from scripts.nano.ablation import ABLATIONS, EXPERT, LAYER, NEEDED, evaluate_ablations, write_ablated
from scripts.nano.begin import FILE, write_beginning
from scripts.nano.evaluation import Evaluator
from scripts.nano.rows import assistant, user
from scripts.nano.senses import senses, wordings

ROUTER = f"thinker.model.layers.{LAYER}.mlp.gate.weight"
CHANGED = {
    "deepstack": {f"thinker.visual.merger_list.{i}.mlp.2.{name}" for i in (0, 1) for name in ("weight", "bias")},
    "time": set(),
    "routing": {ROUTER},
    "window": set(),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beginning(tmp_path_factory.mktemp("whole") / "model", wordings(), 1)


@pytest.mark.parametrize("name", ABLATIONS)
def test_one_part_alone_is_removed(name: str, whole: Path, tmp_path: Path) -> None:
    made = write_ablated(whole, name, tmp_path / name)
    before, after = load_file(whole / FILE), load_file(made / FILE)
    assert before.keys() == after.keys()
    # Biases are zero before training too.
    differ = {name for name, x in before.items() if not np.array_equal(x, after[name])}
    assert differ == {one for one in CHANGED[name] if np.any(before[one])}
    same = read_object(whole / "config.json") == read_object(made / "config.json")
    assert same == bool(CHANGED[name]) and {f.name for f in whole.iterdir()} == {f.name for f in made.iterdir()}
    ours = model_config(made).thinker
    assert ours.position_id_per_seconds == (0.1 if name == "time" else 13)
    assert ours.audio.n_window_infer == ours.audio.n_window * (2 if name == "window" else 4)


def test_experts_are_exchanged(whole: Path, tmp_path: Path) -> None:
    router = load_file(whole / FILE)[ROUTER]
    after = load_file(write_ablated(whole, "routing", tmp_path / "routing") / FILE)[ROUTER]
    order = list(range(len(router)))
    order[EXPERT : EXPERT + 2] = EXPERT + 1, EXPERT
    assert not np.array_equal(after, router) and np.array_equal(after[order], router)


def test_the_senses_are_there(tmp_path: Path) -> None:
    assert {one.sense for one in ABLATIONS.values()} <= {sense.name for sense in senses(tmp_path)}
    assert {*NEEDED} < {*ABLATIONS}


def test_copies_are_asked_once(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked the rows of its sense, is a model of its own, and its replies are kept with those of the whole."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "0-rms.wav").write_bytes(b"sound")
    question = user({"type": "audio", "audio": "0-rms.wav"}, "What?")
    for sense in ("scene", "when", "digits"):
        row = {"sense": sense, "messages": [question, assistant("One.")], "answer": "one"}
        (tmp_path / "rows" / f"{sense}.test.jsonl").write_text(json.dumps(row) + "\n")
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(Evaluator, "answers", lambda self, given: asked.append((self.identity, len(given))) or ["One."])
    evaluator = Evaluator(whole, tmp_path)
    found = evaluate_ablations(evaluator, tmp_path)
    assert {name: (one["right"], one["samples"]) for name, one in found.items()} == dict.fromkeys(ABLATIONS, (1, 1))
    assert len({*asked, (evaluator.identity, 1)}) == 1 + len(ABLATIONS)
    assert evaluate_ablations(evaluator, tmp_path) == found and len(asked) == len(ABLATIONS)
