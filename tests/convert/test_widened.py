"""Public quantised checkpoints: each format is read as the weights in float that its numbers stand for, or refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import omni_jax
from convert import convert_checkpoint, load_hf, reverse_checkpoint, verify_checkpoint
from convert.__main__ import main
from omni_jax.errors import CheckpointError
from omni_jax.quantization import KEY
from omni_jax.weights.safetensors import open_checkpoint
from omni_jax.weights.widened import widened
from tests.convert.conftest import edit_json, read_tensors
from tests.helpers.formats import ATTENTION, FORMATS, FP8, INT4
from tests.helpers.quantised import LINEAR, gptq, pack, packed, write

PACKED = "packed 4, router too"
QUESTION = [{"role": "user", "content": "Spell the word table."}]


@pytest.fixture(scope="module")
def made(checkpoints: Callable[[str], Path], tmp_path_factory: Any) -> Callable[[str], tuple[Path, Path]]:
    """The "tiny" checkpoint in one of `FORMATS`, and the same in float; for reading only."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        return write(checkpoints("tiny"), tmp_path_factory.mktemp("quantised"), *FORMATS[name])

    return make


def copy_of(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "copy"))


def assert_equal(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_as_what_it_stands_for(name: str, made: Any) -> None:
    quantised, plain = made(name)
    got, config = load_hf(quantised, parts=("thinker",), dtype="float32")
    want, wanted = load_hf(plain, parts=("thinker",), dtype="float32")
    assert config == wanted
    assert_equal(got, want)


@pytest.mark.parametrize(
    "name", ["packed 4, zero points packed", "packed 8, zero points plain", "gptq 4, columns ordered", "fp8 in blocks"]
)
def test_each_device_reads_its_own_rows(name: str, made: Any) -> None:
    quantised, plain = made(name)
    mesh = "expert=2,tensor=2"
    got, want = (load_hf(x, parts=("thinker",), mesh=mesh, dtype="float32")[0] for x in (quantised, plain))
    assert_equal(got, want)
    source, stored = widened(open_checkpoint(quantised), "float32"), read_tensors(plain)
    name = "thinker.model.layers.0.self_attn.q_proj.weight"
    for rows in ((0, 384), (5, 13), (127, 131), (383, 384)):
        np.testing.assert_array_equal(source.read(name, rows), stored[name][slice(*rows)])


@pytest.mark.parametrize("section", [("thinker_config",), ("thinker_config", "text_config")])
def test_a_section_may_state_it(section: tuple[str, ...], checkpoints: Any, tmp_path: Path) -> None:
    config, makers = FORMATS["gptq 4"]
    quantised, plain = write(checkpoints("tiny"), tmp_path, config, makers, *section)
    got, want = (load_hf(x, parts=("thinker",), dtype="float32")[0] for x in (quantised, plain))
    assert_equal(got, want)
    edit_json(quantised / "config.json", lambda values: values.update({KEY: config | {"bits": 8}}))
    with pytest.raises(CheckpointError, match="quantization_config and thinker_config.* differ"):
        load_hf(quantised)


def test_a_type_is_rounded_to_once(checkpoints: Any, tmp_path: Path) -> None:
    """Scales in bfloat16, as the public checkpoints have them, are multiplied in float32."""
    config, _ = FORMATS["packed 4, router too"]
    maker = packed(4, 32, scale_dtype=ml_dtypes.bfloat16)
    quantised, plain = write(checkpoints("tiny"), tmp_path, config, {LINEAR: maker})
    for dtype in ("float32", "bfloat16", "float16", None):
        got, want = (load_hf(x, parts=("thinker",), dtype=dtype)[0] for x in (quantised, plain))
        assert {x.dtype.name for x in jax.tree.leaves(got)} == {dtype or "float32"}
        assert_equal(got, want)


def test_the_type_is_that_of_the_other_weights(checkpoints: Any, tmp_path: Path) -> None:
    """AutoGPTQ's scales are float16 whatever the model is."""
    config, _ = FORMATS["auto-round"]
    quantised, _ = write(checkpoints("nano"), tmp_path, config, {ATTENTION: gptq(4, 32, True, "", np.float16)})
    got, _ = load_hf(quantised, parts=("thinker",))
    assert {x.dtype.name for x in jax.tree.leaves(got)} == {"bfloat16"}


def test_it_is_a_model_like_any_other(made: Any) -> None:
    quantised, plain = made(PACKED)
    got, want = (omni_jax.load(x, dtype="float32") for x in (quantised, plain))
    assert_equal(got.params, want.params)
    assert got.config == want.config and not got.config.thinker.text.int8_experts
    assert got.generate(QUESTION, max_new_tokens=4).token_ids == want.generate(QUESTION, max_new_tokens=4).token_ids


@pytest.mark.parametrize("name", ["packed 4, zero points packed", "fp8 in blocks"])
def test_its_experts_can_be_put_into_eight_bits(name: str, made: Any) -> None:
    quantised, plain = made(name)
    got, want = (omni_jax.load(x, quantize="int8", dtype="float32", parts=("thinker",)) for x in (quantised, plain))
    assert got.config.thinker.text.int8_experts
    assert_equal(got.params, want.params)


def test_it_can_be_converted_and_verified(made: Any, tmp_path: Path, capsys: Any) -> None:
    pair = made("gptq 4")
    quantised, plain, ours, back = copy_of(pair, tmp_path), pair[1], tmp_path / "ours", tmp_path / "back"
    (quantised / "quantize_config.json").write_text("{}")
    assert main(["--dry-run", str(quantised), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_over"] == 0
    assert main([str(quantised), str(ours), "--verify", "--json"]) == 0
    stored = read_tensors(plain)
    assert json.loads(capsys.readouterr().out)["tensors"] == len(stored) == verify_checkpoint(ours)
    loaded, want = (omni_jax.load(x, parts=("thinker",)).params for x in (ours, plain))
    assert_equal(loaded, want)
    reverse_checkpoint(ours, back)
    restored = read_tensors(back)
    assert restored.keys() == stored.keys() and all(np.array_equal(restored[x], stored[x]) for x in stored)
    assert json.loads((back / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert not (back / "quantize_config.json").exists()


def test_it_can_be_converted_with_experts_in_eight_bits(made: Any, tmp_path: Path) -> None:
    quantised, plain = made(PACKED)
    for source, name in ((quantised, "got"), (plain, "want")):
        convert_checkpoint(source, tmp_path / name, quantize="int8", parts=("thinker",), verify=True)
    got, want = (omni_jax.load(tmp_path / name) for name in ("got", "want"))
    assert got.config.thinker.text.int8_experts
    assert_equal(got.params, want.params)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("gptq 4", {"quant_method": "awq"}, r"quant_method is 'awq'; only compressed-tensors, gptq, .*are read: take the"),
    ("gptq 4", {"quant_method": None}, "quant_method is None; only"),
    ("gptq 4", {"bits": 3}, "quantization_config.bits is 3; only 4, 8 are read"),
    ("gptq 4", {"bits": 4.0}, "bits is 4.0"),
    ("gptq 4", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; only gptq, gptq_v2"),
    ("gptq 4", {"format": "gemm"}, "format is 'gemm'"),
    ("gptq 4", {"pack_dtype": "int8"}, "pack_dtype is 'int8'"),
    ("gptq 4", {"group_size": 0}, "group_size is 0; expected -1, or a whole number above 0"),
    ("gptq 4", {"dynamic": [1]}, r"dynamic is \[1\], not an object"),
    *[("gptq 4", {"dynamic": x}, f"dynamic is {x!r}, not an object; take the") for x in (False, True, 5, "x")],
    *[("auto-round", {"extra_config": x}, f"extra_config is {x!r}, not an object; take the") for x in (False, 7, "x")],
    ("gptq 4", {"dynamic": {"-:.*gate": False}}, "dynamic.-:.*gate is False, not an object"),
    ("gptq 4", {"desc_act": "false"}, "desc_act is 'false'; only False, True are read"),
    ("gptq 4", {"checkpoint_format": False}, "checkpoint_format is False; only gptq, gptq_v2"),
    ("gptq 4", {"group_size": -1.0}, "group_size is -1.0; expected -1, or a whole number above 0"),
    (PACKED, {"sparsity_config": False}, "sparsity_config is False, not an object"),
    (PACKED, {"sparsity_config": 5}, "sparsity_config is 5, not an object"),
    (PACKED, {"config_groups": True}, "config_groups is True, not an object"),
    ("gptq 4", {"dynamic": {"+:.*mlp": {"bits": 3}}}, r"dynamic.\+:.*mlp.bits is 3; only 4, 8, 16, 32 are read"),
    ("gptq 4, the older form", {"group_size": 48}, r"qweight' I32 .* and .*scales' .* do not fit each other"),
    ("gptq 4, the older form", {"desc_act": True}, "g_idx' is missing"),
    ("auto-round", {"packing_format": "auto_round:auto_awq"}, "packing_format is 'auto_round:auto_awq'"),
    ("auto-round", {"data_type": "mx_fp"}, "data_type is 'mx_fp'"),
    ("auto-round", {"act_bits": 8}, "act_bits is 8"),
    ("auto-round", {"extra_config": {"lm_head": {"bits": 2}}}, "extra_config.lm_head.bits is 2"),
    ("auto-round", {"extra_config": {"lm_head": {"data_type": "mx_fp"}}}, "extra_config.lm_head.data_type is 'mx_fp'"),
    (PACKED, {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'; only pack-quant"),
    (PACKED, {"format": "mixed-precision"}, "group_0.format is missing"),
    (PACKED, {"transform_config": {"a": 1}}, "transform_config is {'a': 1}; such weights are not read"),
    (PACKED, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format is"),
    (PACKED, {"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 is .*not an object"),
    (PACKED, {"config_groups": {}}, "config_groups is {}; no group has weights"),
    ("fp8 in blocks", {"weight_block_size": [128]}, "weight_block_size is .128.; expected rows and columns"),
    ("fp8 in blocks", {"weight_block_size": [64, 64]}, "F8_E4M3 .* do not fit each other"),
    ("fp8 in blocks", {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
    ("modelopt", {"quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'; only FP8"),
    (PACKED, {"config_groups": {"a": {"weights": INT4 | {"num_bits": 3}}}}, "a.weights.num_bits is 3"),
    (PACKED, {"config_groups": {"a": {"weights": INT4 | {"type": "float"}}}}, "type is 'float'"),
    (PACKED, {"config_groups": {"a": {"weights": INT4 | {"group_size": 64}}}}, "do not fit each other"),
    (PACKED, {"config_groups": {"a": {"weights": INT4 | {"strategy": "token"}}}}, "strategy is 'token'"),
    ("int-quantized", {"config_groups": {"a": {"weights": FP8 | {"strategy": "channel"}}}}, "I8 .* do not fit"),
    ("float-quantized in blocks", {"config_groups": {"a": {"weights": FP8 | {"strategy": "block"}}}}, "block_str"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), WRONG, ids=[f"{name} {x}"[:70] for name, x, _ in WRONG])
def test_what_is_not_read_is_refused(name: str, changes: dict[str, Any], said: str, made: Any) -> None:
    source = open_checkpoint(made(name)[0])
    with pytest.raises(CheckpointError, match=said) as caught:
        widened(replace(source, config=source.config | {KEY: FORMATS[name][0] | changes}))
    assert re.search("take the (unquantised|config.json)|without it", str(caught.value))


def test_nothing_is_written_of_what_is_refused(made: Any, tmp_path: Path) -> None:
    bad = copy_of(made("gptq 4"), tmp_path)
    edit_json(bad / "config.json", lambda values: values[KEY].update(quant_method="awq"))
    with pytest.raises(CheckpointError, match="quant_method is 'awq'"):
        omni_jax.load(bad)
    with pytest.raises(CheckpointError, match="quant_method is 'awq'"):
        convert_checkpoint(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


Q_PROJ = "thinker.model.layers.0.self_attn.q_proj"
DAMAGE: list[tuple[str, dict[str, Any], str]] = [
    ("gptq 4", {"weight": np.zeros((384, 256), np.float32)}, "weight' is there beside .*qweight'; remove one of them"),
    ("gptq 4", {"scales": None}, "scales' is missing"),
    ("gptq 4", {"scales": np.zeros((8, 384), np.int32)}, "scales' is I32, expected F32 or F16 or BF16"),
    ("gptq 4", {"g_idx": np.zeros(8, np.int32)}, r"g_idx' is \[8\], expected \[256\]"),
    ("gptq 4", {"g_idx": np.full(256, 8, np.int32)}, "g_idx' names groups from 8"),
    ("gptq 4", {"g_idx": np.arange(256, dtype=np.int32) - 1}, "g_idx' names no group for some columns"),
    ("gptq 4", {"qzeros": np.zeros((8, 36), np.int32)}, "do not fit each other"),
    (PACKED, {"weight_packed": np.zeros((2, 384, 32), np.int32)}, r"is \[2, 384, 32\], expected two axes"),
    (PACKED, {"weight_zero_point": np.zeros((384, 1), np.int8)}, "do not fit each other"),
    ("packed 4 per channel", {"weight_shape": np.array([384, 999])}, "do not fit each other"),
    ("packed 4 per channel", {"weight_shape": None}, "weight_shape' is missing"),
    ("int-quantized", {"weight_scale": None}, "weight' has no weight_scale"),
    ("int-quantized", {"weight_zero_point": np.zeros((1, 1), np.int8)}, "do not fit each other"),
    ("fp8 in blocks", {"weight_scale": np.zeros(1, np.float32)}, "has both .*weight_scale' and .*weight_scale_inv'"),
    ("fp8 in blocks", {"weight_scale_inv": np.full((3, 2), 2000, np.float32)}, "holds reciprocals of scales"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "said"), DAMAGE, ids=[f"{name} {next(iter(x))}" for name, x, _ in DAMAGE])
def test_tensors_that_do_not_belong_together(
    name: str, changes: dict[str, Any], said: str, made: Any, tmp_path: Path
) -> None:
    quantised = copy_of(made(name), tmp_path)
    source = open_checkpoint(quantised)
    tensors = {name: source.read(name) for name in source.tensors}
    for last, value in changes.items():
        tensors.pop(f"{Q_PROJ}.{last}", None)
        tensors |= {} if value is None else {f"{Q_PROJ}.{last}": value}
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        load_hf(quantised, parts=("thinker",))


@pytest.mark.parametrize("kind, order", [("packed 4, zero points packed", "weight_g_idx"), ("gptq 4", "g_idx")])
def test_groups_that_were_never_set_are_the_usual_ones(kind: str, order: str, made: Any, tmp_path: Path) -> None:
    pair = made(kind)
    quantised, plain = copy_of(pair, tmp_path), pair[1]
    tensors = load_file(quantised / "model.safetensors")
    save_file(tensors | {f"{Q_PROJ}.{order}": np.full(256, -1, np.int32)}, quantised / "model.safetensors")
    got, want = (load_hf(x, parts=("thinker",))[0] for x in (quantised, plain))
    assert_equal(got, want)


def test_a_checkpoint_that_does_not_say_how_it_is_quantised(checkpoints: Any, tmp_path: Path) -> None:
    quantised, _ = write(checkpoints("tiny"), tmp_path, None, {LINEAR: packed(4, 32)})
    with pytest.raises(CheckpointError, match="this checkpoint is quantised: take the config.json that says how"):
        load_hf(quantised)


def test_packing_puts_the_first_number_lowest() -> None:
    numbers = np.array([[1, 2, 3]])
    assert pack(numbers, 4).tolist() == [[0x321]] and pack(numbers, 8).tolist() == [[0x30201]]
