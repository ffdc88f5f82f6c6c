"""Adapters of PEFT: read, checked and merged, they give what PEFT gives."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import omni_jax as oj
from convert import convert_checkpoint
from omni_jax.cli import main
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.loading import load_lazily
from omni_jax.weights.trees import flatten
from tests.helpers.adapters import ATTENTION, EXPERTS, TOKENS, fresh, logits, wrap
from tests.helpers.commands import status_of

pytest.importorskip("peft")

# Settings of adapters as people make them, by name.
WRITTEN: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 24},
    # PEFT fuses these: gate and up with twice the rank.
    "everything": {"target_modules": [*ATTENTION, *EXPERTS, "gate"], "r": 4, "lora_alpha": 12},
    "parameters": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 3, "lora_alpha": 12},
    "down alone": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 2, "lora_alpha": 4},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "use_rslora": False,
        "rank_pattern": {"v_proj": 6, r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"q_proj": 40},
    },
    "rslora": {"target_modules": ["k_proj", "o_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [2], "r": 4, "lora_alpha": 32},
}  # fmt: skip


@pytest.fixture(scope="session")
def written(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`written(name)`: the directory that peft wrote for the Thinker of "small", and the logits of peft's own model."""
    made: dict[str, tuple[Path, np.ndarray]] = {}

    def write(name: str) -> tuple[Path, np.ndarray]:
        if name not in made:
            model, directory = fresh(checkpoints("small")), tmp_path_factory.mktemp("adapters") / name
            wrapped = wrap(model.thinker, **WRITTEN[name])
            wrapped.save_pretrained(directory)
            made[name] = directory, logits(wrapped)
        return made[name]

    return write


def merged_logits(omni: oj.Omni) -> np.ndarray:
    return np.asarray(jax.jit(lambda ids: omni.thinker(ids))(TOKENS))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_peft_gives_the_logits_of_peft(name: str, written: Any, checkpoints: Any) -> None:
    directory, want = written(name)
    omni = oj.load(checkpoints("small"), parts=("thinker",), adapter=directory)
    np.testing.assert_allclose(merged_logits(omni), want, atol=5e-4)


def test_every_weight_is_what_peft_merges(checkpoints: Any, tmp_path: Path) -> None:
    """Of the whole model, with its encoders and the Talker; of gate, up and down peft adapts those of experts alone."""
    names = [*ATTENTION, *EXPERTS, "qkv", "linear_fc1", "mlp.2", "out_proj", "fc2", "conv_out", "fc1"]
    model = fresh(checkpoints("small"))
    wrapped = wrap(model, target_modules=names, exclude_modules=r"code2wav\..*", r=3, lora_alpha=5)
    wrapped.save_pretrained(tmp_path / "adapter")
    omni, plain = (oj.load(checkpoints("small"), adapter=adapter) for adapter in (tmp_path / "adapter", None))
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    want = oj.load(_whole(tmp_path / "merged", checkpoints("small")))
    got, want, before = (flatten(one.params) for one in (omni, want, plain))
    changed = {path for path in got if not np.array_equal(got[path], before[path])}
    for path, array in got.items():
        np.testing.assert_allclose(array, want[path], atol=1e-5 * np.abs(want[path]).max(), err_msg=path)
    assert {"thinker/layers/qkv", "thinker/vision/blocks/qkv/weight", "thinker/audio/blocks/qkv/weight"} <= changed
    assert {"talker/layers/moe/gate_up", "talker/code_predictor/layers/out"} <= changed
    assert not any(path.startswith("code2wav") or "norm" in path for path in changed)


def _whole(directory: Path, source: Path) -> Path:
    """The small files beside weights that transformers saved."""
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and not file.name.startswith("model"):
            shutil.copy(file, directory / file.name)
    return directory


def test_a_converted_checkpoint_on_a_mesh_takes_an_adapter(written: Any, checkpoints: Any, tmp_path: Path) -> None:
    directory, want = written("everything")
    convert_checkpoint(checkpoints("small"), tmp_path / "converted")
    mesh = "thinker:expert=2,fsdp=2,tensor=1,data=2"
    omni = oj.load(tmp_path / "converted", mesh=mesh, parts=("thinker",), adapter=directory)
    np.testing.assert_allclose(merged_logits(omni), want, atol=5e-4)
    plain = oj.load(tmp_path / "converted", mesh=mesh, parts=("thinker",))
    for path, array in flatten(omni.params).items():
        assert array.sharding == flatten(plain.params)[path].sharding


def test_the_sum_is_rounded_once(written: Any, checkpoints: Any) -> None:
    """In bfloat16 the update is added to the weights in float32."""
    directory, _ = written("attention")
    exact, half = (
        oj.load(checkpoints("small"), parts=("thinker",), dtype=dtype, adapter=directory)
        for dtype in ("float32", "bfloat16")
    )
    base = oj.load(checkpoints("small"), parts=("thinker",), dtype="bfloat16").params["thinker"]["layers"]["qkv"]
    full = oj.load(checkpoints("small"), parts=("thinker",)).params["thinker"]["layers"]["qkv"]
    update = np.asarray(exact.params["thinker"]["layers"]["qkv"]) - np.asarray(full)
    want = (np.asarray(base, np.float32) + update).astype(ml_dtypes.bfloat16).astype(np.float32)
    got = np.asarray(half.params["thinker"]["layers"]["qkv"], np.float32)
    assert np.mean(got == want) > 0.999


def damaged(source: Path, to: Path, values: dict[str, Any] | None = None, **tensors: np.ndarray | None) -> Path:
    """An adapter with other values in its configuration, and tensors that are other ones or, if None, missing."""
    to.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | (values or {})))
    held = load_file(source / "adapter_model.safetensors")
    held |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file({n: x for n, x in held.items() if tensors.get(n, x) is not None}, to / "adapter_model.safetensors")
    return to


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
X = "base_model.model.model.language_model.layers.0.self_attn.x_proj.lora_"
ZEROS = np.zeros((4, 96), np.float32)
BROKEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"use_dora": True}, {}, "use_dora: DoRA's magnitudes cannot be read; merge the adapter with PEFT"),
    ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save: whole modules cannot be read"),
    ({"bias": "all"}, {}, "also changes biases"),
    ({"init_lora_weights": "pissa"}, {}, "'pissa' changed the weights"),
    ({"peft_type": "LOHA"}, {}, "'LOHA'; only LORA adapters are read"),
    ({"r": "eight"}, {}, "r is 'eight', not a number above 0"),
    ({"r": 5}, {}, "k_proj is [4, 96], for this model and rank it would be [5, 96]; take the adapter that was trained"),
    ({"alpha_pattern": {"(": 3}}, {}, "which is no pattern"),
    ({}, {f"{Q}B.weight": None}, "q_proj.lora_B.weight' is missing; copy the whole file again"),
    ({}, {f"{Q}A.weight": ZEROS[:, :90]}, "lora_A of model.language_model.layers.0.self_attn.q_proj is [4, 90]"),
    ({}, {f"{X}A.weight": ZEROS, f"{X}B.weight": ZEROS.T}, "the model has no model.language_model.layers.0.self_attn"),
    ({}, {f"{Q}magnitude_vector": ZEROS}, "magnitude_vector' is no factor of a linear layer"),
    ({}, {f"{Q}A.weight": ZEROS.astype(np.int32)}, "q_proj.lora_A.weight' is I32 [4, 96]"),
]


@pytest.mark.parametrize("values, tensors, said", BROKEN)
def test_adapters_that_are_refused(
    values: dict, tensors: dict, said: str, written: Any, checkpoints: Any, tmp_path: Path
) -> None:
    directory = damaged(written("attention")[0], tmp_path / "damaged", values, **tensors)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load_lazily(checkpoints("small"), adapter=directory)
    assert said in str(error.value) and str(directory) in str(error.value)


def test_missing_files_and_other_models(written: Any, checkpoints: Any, tmp_path: Path) -> None:
    directory, _ = written("everything")
    with pytest.raises(CheckpointError, match="take the adapter that was trained for this model"):
        load_lazily(checkpoints("tiny"), adapter=directory)
    with pytest.raises(ConfigError, match="adapter_config.json"):
        load_lazily(checkpoints("small"), adapter=checkpoints("small"))
    bare = damaged(directory, tmp_path / "bare")
    (bare / "adapter_model.safetensors").rename(bare / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"is missing; adapter_model\.bin is a pickle"):
        load_lazily(checkpoints("small"), adapter=bare)
    nan = damaged(directory, tmp_path / "nan", None, **{f"{Q}A.weight": ZEROS + np.nan})
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        oj.load(checkpoints("small"), parts=("thinker",), adapter=nan)


def test_inspect_says_what_is_adapted(written: Any, checkpoints: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "--model", str(checkpoints("small")), "--adapter", str(written("attention")[0])])
    said = capsys.readouterr().out
    assert "5 matrices thinker.model.layers.*.self_attn.q_proj" in said and "experts: not adapted" in said
    main(["inspect", "--model", str(checkpoints("small")), "--json", "--adapter", str(written("everything")[0])])
    report = json.loads(capsys.readouterr().out)["adapter"]
    assert report["matrices"]["thinker.model.layers.*.mlp.experts.*.down_proj"] == 30
    assert report["parameters"] == sum(
        x.size for x in load_file(written("everything")[0] / "adapter_model.safetensors").values()
    )


def test_commands_take_an_adapter(
    written: Any, checkpoints: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = str(checkpoints("small")), str(written("everything")[0])
    said = []
    for more in ([], ["--adapter", adapter]):
        main(["generate", "--model", model, "--text", "hello", "--max-new-tokens", "8", *more])
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "hello", "references": [said[1].strip()]}) + "\n")
    evaluated = ["evaluate", "--model", model, "--data", str(data), "--output", str(tmp_path / "run")]
    main([*evaluated, "--max-new-tokens", "8", "--json", "--adapter", adapter])
    assert json.loads(capsys.readouterr().out)["scores"]["exact_normalised"] == 1
    # Another model's results are not mixed with these.
    assert status_of([*evaluated, "--max-new-tokens", "8"]) == 3
