"""Routed experts in eight bits: made from a checkpoint, stored, written back, and run."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import omni_jax
from convert import convert_checkpoint, reverse_checkpoint, verify_checkpoint
from omni_jax.errors import CheckpointError, InputError
from omni_jax.omni import Omni
from omni_jax.quantization import KEY, STATED
from omni_jax.train.objective import check_trainable
from omni_jax.weights.int8 import EXPERT, Int8Experts, quantised, rounded
from omni_jax.weights.locate import locate
from omni_jax.weights.safetensors import SourceCheckpoint, open_checkpoint
from tests.convert.conftest import read_tensors

QUESTION = [{"role": "user", "content": "Spell the word table."}]


@pytest.fixture(scope="module")
def source() -> Path:
    return locate("nano")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: Any) -> Path:
    directory = tmp_path_factory.mktemp("int8") / "converted"
    convert_checkpoint(source, directory, quantize="int8", verify=True)
    return directory


@pytest.fixture(scope="module")
def model(source: Path) -> Omni:
    return omni_jax.load(source, quantize="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_is_within_half_a_step(dtype: str) -> None:
    weight = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    weight[3], weight[5] = 0, weight[5] * 1e-6
    values, scale = rounded(weight, np.dtype(dtype))
    steps, exact = scale.astype(np.float32), np.abs(weight).max(1, keepdims=True) / 127
    assert np.all(np.abs(values * steps - weight) <= steps / 2 * 1.0001)
    assert np.abs(values).max() == 127 and not values[3].any()
    # Nothing is cut off, also where a type rounds scales.
    assert np.all(np.abs(weight) <= 127 * steps * (1 + 1e-6))
    # No coarser than its type makes it.
    assert np.all(steps[exact > 0] <= exact[exact > 0] * (1 + float(ml_dtypes.finfo(np.dtype(dtype)).eps)))


def test_there_and_back(source: Path, converted: Path, tmp_path: Path) -> None:
    before = read_tensors(source)
    reverse_checkpoint(converted, tmp_path / "back")
    after = read_tensors(tmp_path / "back")
    experts = {name for name in before if EXPERT.fullmatch(name)}
    assert experts and after.keys() == before.keys() | {f"{name}_scale" for name in experts}
    for name, tensor in before.items():
        if name in experts:
            scale = after[f"{name}_scale"].astype(np.float32)
            assert after[name].dtype == np.int8 and scale.shape == (len(tensor), 1)
            assert np.all(np.abs(after[name] * scale - tensor.astype(np.float32)) <= scale / 2 * 1.0001)
        else:
            assert np.array_equal(after[name], tensor)
    assert json.loads((tmp_path / "back" / "config.json").read_text())[KEY] == STATED
    # Written back, it is a checkpoint like any other.
    again = tmp_path / "again"
    convert_checkpoint(tmp_path / "back", again)
    assert verify_checkpoint(again) == len(after)


def test_stored_and_made_while_loading_are_the_same(converted: Path, model: Omni) -> None:
    stored = omni_jax.load(converted)
    assert {str(x.dtype) for x in jax.tree.leaves(stored.params)} == {"float32", "int8"}
    jax.tree.map(np.testing.assert_array_equal, stored.params, model.params)
    half = omni_jax.load(converted, dtype="bfloat16", parts=("thinker",))
    assert {str(x.dtype) for x in jax.tree.leaves(half.params)} == {"bfloat16", "int8"}


def test_logits_are_those_of_the_weights_that_the_numbers_stand_for(source: Path, model: Omni) -> None:
    wide = omni_jax.load(source, parts=("thinker",))
    moe, held = wide.params["thinker"]["layers"]["moe"], model.params["thinker"]["layers"]["moe"]
    gate_up, down = (
        np.asarray(held[name]) * np.asarray(held[f"{name}_scale"])[..., None] for name in ("gate_up", "down")
    )
    moe["gate_up"], moe["down"] = np.moveaxis(gate_up, -1, 2), down.swapaxes(2, 3)
    got, want = (np.asarray(omni.logits(omni.prepare(QUESTION))) for omni in (model, wide))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_it_answers_and_speaks(model: Omni) -> None:
    reply = model.generate(QUESTION, speech=True, max_new_tokens=40)
    assert reply.text == "T, a, b, l, e." and reply.audio is not None and len(reply.audio) > 24_000


def test_over_devices(source: Path, model: Omni) -> None:
    omni = omni_jax.load(source, quantize="int8", mesh="expert=2,tensor=2", parts=("thinker",))
    got, want = (np.asarray(one.logits(one.prepare(QUESTION))) for one in (omni, model))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "loaded": lambda source, out: omni_jax.load(source, quantize="int8"),
    "loaded over devices": lambda source, out: omni_jax.load(source, quantize="int8", mesh="expert=2,tensor=2"),
    "converted": lambda source, out: convert_checkpoint(source, out / "ours", quantize="int8"),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_weight_is_read_once(way: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, plain = Counter(), SourceCheckpoint.read

    def counted(self: SourceCheckpoint, name: str, rows: Any = None) -> np.ndarray:
        read[name] += 1
        return plain(self, name, rows)

    monkeypatch.setattr(SourceCheckpoint, "read", counted)
    WAYS[way](source, tmp_path)
    experts = {name for name in open_checkpoint(source).tensors if EXPERT.fullmatch(name)}
    assert experts and Counter(read[name] for name in experts) == {1: len(experts)}


def test_scales_are_kept_until_they_are_asked_for(source: Path) -> None:
    opened = quantised(open_checkpoint(source), "int8")
    assert isinstance(opened, Int8Experts)
    name = next(name for name in opened.tensors if EXPERT.fullmatch(name))
    _, scale = rounded(read_tensors(source)[name].astype(np.float32), np.dtype(ml_dtypes.bfloat16))
    for rows, wanted in ((None, None), (None, (3, 9)), ((2, 9), (3, 9)), ((3, 8), (3, 9)), ((3, 9), None)):
        opened.read(name, rows)
        assert [*opened.kept] == [name]
        got = opened.read(f"{name}_scale", wanted)
        np.testing.assert_array_equal(got, scale if wanted is None else scale[slice(*wanted)])
        assert not opened.kept


def test_a_config_that_states_null_is_not_quantised(source: Path) -> None:
    opened = open_checkpoint(source)
    stating = replace(opened, config=opened.config | {KEY: None})
    assert isinstance(quantised(stating, "int8"), Int8Experts)


def test_wrong_requests_name_the_remedy(source: Path, converted: Path, model: Omni, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'int4'; give 'int8'"):
        omni_jax.load(source, quantize="int4")
    convert_checkpoint(source, tmp_path / "wide", parts=("thinker",))
    with pytest.raises(InputError, match="convert its source again with --quantize int8"):
        omni_jax.load(tmp_path / "wide", quantize="int8")
    omni_jax.load(converted, quantize="int8", parts=("code2wav",))
    reverse_checkpoint(converted, tmp_path / "back")
    with pytest.raises(CheckpointError, match="quantised already"):
        omni_jax.load(tmp_path / "back", quantize="int8")
    with pytest.raises(InputError, match="an adapter cannot be merged"):
        omni_jax.load(source, quantize="int8", adapter=tmp_path)
    with pytest.raises(InputError, match="cannot be trained"):
        check_trainable(model.config.thinker.text)


def test_numbers_that_eight_bits_cannot_hold(source: Path, tmp_path: Path) -> None:
    bad, tensors = tmp_path / "bad", read_tensors(source)
    shutil.copytree(source, bad)
    tensors[next(name for name in tensors if EXPERT.fullmatch(name))][0, 0] = np.nan
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        convert_checkpoint(bad, tmp_path / "out", quantize="int8", allow_nonfinite=True)
    assert not (tmp_path / "out").exists()
