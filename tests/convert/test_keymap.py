"""The key map against the public manifest, against transformers, and against placements written out by hand."""

import copy
import gzip
import json
from dataclasses import replace
from math import prod

import jax
import numpy as np
import pytest

from convert import load_hf
from omni_jax.config import OmniConfig
from omni_jax.weights.keymap import table
from omni_jax.weights.layout import Leaf, Stack, TensorPlace
from omni_jax.weights.parts import declare_parts, declared_arrays
from omni_jax.weights.plan import plan_weights
from omni_jax.weights.safetensors import open_checkpoint, open_manifest
from scripts.small.configs import config_dict
from tests.convert.conftest import read_tensors
from tests.helpers.keymap import check_table


@pytest.fixture(scope="session")
def public(data_dir):
    return json.loads((data_dir / "public_config.json").read_text())


def names(rows):
    return {name: source.shape for leaf in rows for index in leaf.indices() for name, source in leaf.placements(index)}


def test_public_checkpoint_is_placed_completely(public, data_dir):
    rows = table(OmniConfig.from_hf(public))
    check_table(rows)
    manifest = json.loads(gzip.decompress((data_dir / "tensor_manifest.json.gz").read_bytes()))["tensors"]
    assert names(rows) == {name: tuple(shape) for name, shape in manifest.items()}
    assert len(manifest) == 28_010
    assert sum(prod(leaf.shape) for leaf in rows) == 35_259_818_545


def test_dry_run_of_the_public_manifest(data_dir):
    source = open_manifest(data_dir / "tensor_manifest.json.gz", data_dir / "public_config.json")
    made = plan_weights(source)
    assert (made.tensors, made.parameters, made.bytes) == (28_010, 35_259_818_545, 70_519_637_090)
    assert made.largest == ("thinker/layers/moe/gate_up", 48 * 128 * 2048 * 2 * 768 * 2)
    thinker = plan_weights(source, parts=("thinker",))
    assert {leaf.path.split("/")[0] for leaf, _ in thinker.leaves} == {"thinker"}
    assert thinker.parameters == 31_719_205_488


@pytest.mark.parametrize("variant", ["tiny", "small", "odd"])
def test_small_checkpoints_are_placed_completely(checkpoints, variant):
    source = open_checkpoint(checkpoints(variant))
    made = plan_weights(source)
    check_table([leaf for leaf, _ in made.leaves])
    assert made.tensors == len(source.tensors) == len(read_tensors(checkpoints(variant)))
    assert made.parameters == sum(prod(tensor.shape) for tensor in source.tensors.values())


def test_what_transformers_saves_is_placed(reference, tmp_path, checkpoints):
    """save_pretrained undoes the names and fused experts that transformers has in memory."""
    reference("odd").save_pretrained(tmp_path / "saved")
    ours, _ = load_hf(checkpoints("odd"))
    saved, _ = load_hf(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, ours, saved)


def test_tree_of_shapes_and_axes(public):
    rows = {leaf.path: leaf for leaf in table(OmniConfig.from_hf(public))}
    assert all(len(leaf.shape) == len(leaf.axes) for leaf in rows.values())
    assert rows["thinker/layers/qkv"].shape == (48, 4, 10, 128, 2048)
    assert rows["thinker/layers/moe/gate_up"].axes == ("layers", "expert", "embed", None, "mlp")
    assert rows["talker/code_predictor/embed"].shape == (15, 2048, 1024)
    assert rows["code2wav/embed"].shape == (16, 2048, 1024)


@pytest.mark.parametrize("variant", ["tiny", "small", "odd", "medium", "public"])
def test_every_declared_array_has_a_row(variant, public):
    config = OmniConfig.from_hf(public if variant == "public" else config_dict(variant))
    rows = table(config)
    check_table(rows)
    declared = {part: declared_arrays(declaration, f"{part}/") for part, declaration in declare_parts(config).items()}
    assert {leaf.path for leaf in rows} == {path for arrays in declared.values() for path in arrays}


def test_a_model_without_speech_has_only_a_thinker(public):
    config = OmniConfig.from_hf(copy.deepcopy(public) | {"enable_audio_output": False})
    assert {leaf.path.split("/")[0] for leaf in table(config)} == {"thinker"}


def test_tied_embeddings_have_no_head(checkpoints):
    config = OmniConfig.from_hf(json.loads((checkpoints("odd") / "config.json").read_text()))
    assert "thinker/lm_head" not in {leaf.path for leaf in table(config)}


@pytest.fixture(scope="module")
def odd(checkpoints):
    """The tree and the tensors of "odd", which mixes dense and expert layers and groups queries."""
    params, config = load_hf(checkpoints("odd"))
    return jax.tree.map(np.asarray, params), read_tensors(checkpoints("odd")), config


def test_attention_projections(odd):
    params, disk, config = odd
    c, at = config.thinker.text, "thinker.model.layers.4.self_attn"
    K, G, H, D = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim, c.hidden_size
    qkv = params["thinker"]["layers"]["qkv"][4]
    query = disk[f"{at}.q_proj.weight"].reshape(c.num_heads, H, D)
    for k in range(K):
        for g in range(G):
            np.testing.assert_array_equal(qkv[k, g], query[k * G + g])
        np.testing.assert_array_equal(qkv[k, G], disk[f"{at}.k_proj.weight"][k * H : (k + 1) * H])
        np.testing.assert_array_equal(qkv[k, G + 1], disk[f"{at}.v_proj.weight"][k * H : (k + 1) * H])
    out = params["thinker"]["layers"]["out"][4].reshape(D, -1)
    np.testing.assert_array_equal(out, disk[f"{at}.o_proj.weight"])


def test_experts_and_plain_layers_keep_their_own_stacks(odd):
    params, disk, config = odd
    layers, dense = params["thinker"]["layers"], config.thinker.text.dense_layers
    sparse = [i for i in range(config.thinker.text.num_layers) if i not in dense]
    assert dense
    assert sparse
    for row, l in enumerate(sparse):
        at = f"thinker.model.layers.{l}.mlp"
        np.testing.assert_array_equal(layers["moe"]["router"][row], disk[f"{at}.gate.weight"])
        for e in range(config.thinker.text.num_experts):
            gate_up, down = layers["moe"]["gate_up"][row, e], layers["moe"]["down"][row, e]
            np.testing.assert_array_equal(gate_up[:, 0], disk[f"{at}.experts.{e}.gate_proj.weight"].T)
            np.testing.assert_array_equal(gate_up[:, 1], disk[f"{at}.experts.{e}.up_proj.weight"].T)
            np.testing.assert_array_equal(down, disk[f"{at}.experts.{e}.down_proj.weight"].T)
    for row, l in enumerate(dense):
        at = f"thinker.model.layers.{l}.mlp"
        np.testing.assert_array_equal(layers["mlp"]["gate_up"][row, 0], disk[f"{at}.gate_proj.weight"])
        np.testing.assert_array_equal(layers["mlp"]["gate_up"][row, 1], disk[f"{at}.up_proj.weight"])
        np.testing.assert_array_equal(layers["mlp"]["down"][row], disk[f"{at}.down_proj.weight"])


def test_encoders(odd):
    params, disk, config = odd
    vision, audio = params["thinker"]["vision"], params["thinker"]["audio"]
    patch = disk["thinker.visual.patch_embed.proj.weight"]
    np.testing.assert_array_equal(vision["patch_embed"]["weight"], patch.reshape(len(patch), -1))
    D = config.thinker.vision.hidden_size
    for i in range(3):
        fused = disk["thinker.visual.blocks.2.attn.qkv.weight"][i * D : (i + 1) * D]
        np.testing.assert_array_equal(vision["blocks"]["qkv"]["weight"][2, i].reshape(D, D), fused)
        name = f"thinker.audio_tower.layers.1.self_attn.{'qkv'[i]}_proj"
        ours = audio["blocks"]["qkv"]
        np.testing.assert_array_equal(
            ours["weight"][1, i].reshape(disk[f"{name}.weight"].shape), disk[f"{name}.weight"]
        )
        np.testing.assert_array_equal(ours["bias"][1, i].reshape(-1), disk[f"{name}.bias"])
    np.testing.assert_array_equal(
        vision["deepstack"]["fc1"]["weight"][1], disk["thinker.visual.merger_list.1.mlp.0.weight"]
    )
    norm = disk["thinker.audio_tower.layers.0.final_layer_norm.weight"]
    np.testing.assert_array_equal(audio["blocks"]["mlp_norm"]["weight"][0], norm)


def test_talker_and_code2wav(odd):
    params, disk, config = odd
    talker, code2wav = params["talker"], params["code2wav"]
    shared = "talker.model.layers.1.mlp.shared_expert"
    ours = talker["layers"]["shared_expert"]
    np.testing.assert_array_equal(ours["gate_up"][1, 1], disk[f"{shared}.up_proj.weight"])
    np.testing.assert_array_equal(ours["gate"][1], disk[f"{shared}_gate.weight"][0])
    predictor = talker["code_predictor"]
    np.testing.assert_array_equal(predictor["lm_head"][2], disk["talker.code_predictor.lm_head.2.weight"])
    C = config.code2wav.codebook_size
    np.testing.assert_array_equal(code2wav["embed"][3], disk["code2wav.code_embedding.weight"][3 * C : 4 * C])
    last = len(config.code2wav.upsample_rates) + 1
    np.testing.assert_array_equal(code2wav["decoder"]["alpha"], disk[f"code2wav.decoder.{last}.alpha"])
    unit = code2wav["decoder"]["block_1"]["unit_2"]
    np.testing.assert_array_equal(unit["act2"]["beta"], disk["code2wav.decoder.2.block.4.act2.beta"])
    np.testing.assert_array_equal(unit["conv2"]["weight"], disk["code2wav.decoder.2.block.4.conv2.conv.weight"])
    scale = disk["code2wav.pre_transformer.layers.1.mlp_layer_scale.scale"]
    np.testing.assert_array_equal(code2wav["layers"]["mlp_scale"][1], scale)


def test_check_sees_wrong_rows():
    good = Leaf("a", (), (2, 3), (None, None), (TensorPlace("x", (3,), at=(0,)), TensorPlace("y", (3,), at=(1,))))
    check_table([good])
    overlap = replace(good, sources=(good.sources[0], replace(good.sources[1], at=(0,))))
    hole = replace(good, sources=good.sources[:1])
    lost = Leaf("b", (Stack("l", (0, 2, 5)),), (2, 3), (None, None), (TensorPlace("z{l}", (3,)),))
    size = replace(good, sources=(good.sources[0], replace(good.sources[1], shape=(4,))))
    for wrong, message in (
        (overlap, "filled 0 to 2"),
        (hole, "filled 0 to 1"),
        (size, "does not fill"),
        (lost, "3 indices of 'l' for an axis of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            check_table([wrong])
    with pytest.raises(ValueError, match="lists path 'a' 2 times"):
        check_table([good, good])
    with pytest.raises(ValueError, match="lists tensor 'x' 2 times"):
        check_table([good, replace(good, path="b")])
