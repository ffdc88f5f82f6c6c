"""Copies of omni-nano that lack one part: what differs from the whole is that part alone."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from omni_jax.files import read_object
from omni_jax.weights.model import model_config
from scripts.nano.ablation import ABLATIONS, EXPERT, LAYER, write_ablated
from scripts.nano.begin import FILE, write_beginning
from scripts.nano.see import see_senses
from scripts.nano.senses import wordings

ROUTER = f"thinker.model.layers.{LAYER}.mlp.gate.weight"
CHANGED = {
    "deepstack": {f"thinker.visual.merger_list.{i}.mlp.2.{name}" for i in (0, 1) for name in ("weight", "bias")},
    "time": set(),
    "routing": {ROUTER},
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


def test_experts_are_exchanged(whole: Path, tmp_path: Path) -> None:
    router = load_file(whole / FILE)[ROUTER]
    after = load_file(write_ablated(whole, "routing", tmp_path / "routing") / FILE)[ROUTER]
    order = list(range(len(router)))
    order[EXPERT : EXPERT + 2] = EXPERT + 1, EXPERT
    assert not np.array_equal(after, router) and np.array_equal(after[order], router)


def test_the_senses_are_there() -> None:
    seen = {sense.name for sense in see_senses(Path(), lambda *_: np.zeros(1, np.float32))}
    assert {one.sense for one in ABLATIONS.values()} <= seen
