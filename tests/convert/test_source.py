"""Damaged, dangerous and merely wrong source checkpoints: each is refused with a message that names the thing."""

import json
import os
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest

from convert import convert_checkpoint
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.loading import load
from omni_jax.weights.model import model_config
from omni_jax.weights.plan import plan_weights
from omni_jax.weights.safetensors import open_checkpoint, open_manifest, read_header
from tests.convert.conftest import INDEX, edit_header, edit_json, edit_tensors, write_header

SHARD = "model-00001-of-00002.safetensors"
EXPERT = "talker.model.layers.0.mlp.experts.3"  # In the second shard.


def refused(source, tmp_path, match, error=CheckpointError):
    with pytest.raises(error, match=match):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.endswith((".partial", "out"))) == []


def rename_in_index(source, name):
    edit_json(source / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], name)))


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "..", ""])
def test_paths_in_the_index_stay_in_the_directory(source, tmp_path, name):
    (source / SHARD).rename(tmp_path / "outside.safetensors")
    rename_in_index(source, name)
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, tmp_path, "only files of the directory itself are read")


def test_escaping_links_are_refused(source, tmp_path):
    (source / SHARD).rename(tmp_path / "outside.safetensors")
    (source / SHARD).symlink_to(tmp_path / "outside.safetensors")
    refused(source, tmp_path, "outside the checkpoint")


def test_escaping_json_is_neither_copied_nor_loaded(source, tmp_path):
    (source / "tokenizer.json").rename(tmp_path / "secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    refused(source, tmp_path, "tokenizer.json: leads to .*secret, outside the checkpoint")
    with pytest.raises(CheckpointError, match="tokenizer.json: leads to .*secret, outside the checkpoint"):
        load(source)


def test_blobs_belong_to_snapshots(source, tmp_path):
    for name in ("blobs", "models"):
        (tmp_path / "hub" / name).mkdir(parents=True)
    (source / SHARD).rename(tmp_path / "hub" / "blobs" / "blob")
    snapshot = source.rename(tmp_path / "hub" / "models" / "main")
    (snapshot / SHARD).symlink_to("../../blobs/blob")
    refused(snapshot, tmp_path, "outside the checkpoint")


def test_what_is_named_like_a_shard_must_be_a_file(source, tmp_path):
    (source / SHARD).unlink()
    os.mkfifo(source / SHARD)
    refused(source, tmp_path, f"{SHARD}: not a regular file")


def test_hub_cache_layout_is_read(source, tmp_path):
    """Snapshots of the Hugging Face cache are links into the blobs beside them."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert len(open_checkpoint(snapshot).tensors) == 485


def test_blobs_on_another_disk_are_read(source, tmp_path):
    """People move the cache's large files and leave a link in their place."""
    disk, cache = tmp_path / "disk", tmp_path / "hub" / "models--qwen"
    disk.mkdir()
    (cache / "snapshots" / "main").mkdir(parents=True)
    (cache / "blobs").symlink_to(disk)
    for path in source.iterdir():
        path.rename(disk / f"blob-{path.name}")
        (cache / "snapshots" / "main" / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert len(open_checkpoint(cache / "snapshots" / "main").tensors) == 485
    with pytest.raises(CheckpointError, match="name one of those in its 'snapshots'"):
        open_checkpoint(cache)


def test_what_a_mac_leaves_is_ignored(source, tmp_path):
    for name in ("._model.safetensors", f"._{SHARD}", "._config.json", "._chat_template.jinja", ".DS_Store"):
        (source / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    convert_checkpoint(source, tmp_path / "out", parts=("code2wav",))
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "content, what",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"<!doctype html><html>please log in</html>", "HTML page"),
        (b"PK\x03\x04 archive/data.pkl", "PyTorch pickle"),
        (pickle.dumps({"weight": [1.0]}), "pickle"),
        (b"GGUF\x03\x00\x00\x00 and so on", "GGUF"),
        (b"\x00" * 4, "not a safetensors file"),
        (b"", "not a safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
    ],
)
def test_other_files_named_safetensors(source, tmp_path, content, what):
    (source / SHARD).write_bytes(content)
    refused(source, tmp_path, what)


def test_truncated_data(source, tmp_path):
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data[:-5])
    refused(source, tmp_path, f"{SHARD}: truncated, 5 bytes are missing")


def test_truncated_header(source, tmp_path):
    (source / SHARD).write_bytes((source / SHARD).read_bytes()[:100])
    refused(source, tmp_path, "truncated within its header")


def test_trailing_bytes(source, tmp_path):
    (source / SHARD).write_bytes((source / SHARD).read_bytes() + b"x" * 7)
    refused(source, tmp_path, "7 bytes follow the last tensor")


def test_absurd_header_sizes(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="a header of 200,000,000 bytes"):
        read_header(path)
    entry = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    write_header(path, ("{" + ",".join(f'"t{i}":{{{entry}}}' for i in range(200_001)) + "}").encode(), b"")
    with pytest.raises(CheckpointError, match="200,001 tensors in one file"):
        read_header(path)


@pytest.mark.parametrize(
    "header, what",
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "'a' occurs twice"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "spans 4 bytes, not those of F32"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "'a' is malformed"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "'a' is malformed"),
        (b'{"a":{"dtype":"F32","shape":[1]}}', "'a' is malformed"),
        (b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', "unknown dtype 'X9'"),
        (b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}', "starts at byte 2 of the data, not at 0"),
        (
            b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            "'b' starts at byte 2 of the data, not at 3",
        ),
        (b'{"a":{"dtype":[],"shape":[1],"data_offsets":[0,4]}}', "'a' is malformed"),
        (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 5000), "5000 digits"),
        (b'["a"]', "not a JSON object"),
        (b'{"a":', "no valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"\xff\xfe", "its header cannot be read as UTF-8"),
    ],
)
def test_wrong_headers(tmp_path, header, what):
    write_header(tmp_path / "x.safetensors", header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=what):
        read_header(tmp_path / "x.safetensors")


def test_a_header_may_look_like_a_pickle(tmp_path):
    """A header of 640 bytes starts with the bytes of a pickle."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x280)
    write_header(tmp_path / "x.safetensors", header, b"\0" * 4)
    assert read_header(tmp_path / "x.safetensors")["a"].shape == (1,)


def test_tensor_in_two_shards(source, tmp_path):
    other = {}
    edit_tensors(source, lambda tensors: other.update(dict([next(iter(tensors.items()))])))
    edit_tensors(source, lambda tensors: tensors.update(other), shard=1)
    refused(source, tmp_path, f"'{next(iter(other))}' is in two files")


def test_missing_shard(source, tmp_path):
    (source / SHARD).unlink()
    refused(source, tmp_path, f"{SHARD} is missing")


def test_tensor_that_the_index_does_not_list(source, tmp_path):
    edit_json(source / INDEX, lambda index: index["weight_map"].pop("thinker.model.norm.weight") and None)
    refused(source, tmp_path, "'thinker.model.norm.weight' of .* is not in")


def test_tensor_that_only_the_index_lists(source, tmp_path):
    edit_json(source / INDEX, lambda index: index["weight_map"].update({"thinker.more": SHARD}))
    refused(source, tmp_path, "promises tensor 'thinker.more'")


def test_unlisted_file(source, tmp_path):
    (source / "adapter_model.safetensors").write_bytes((source / SHARD).read_bytes())
    refused(source, tmp_path, "adapter_model.safetensors is not in")


def test_several_files_without_index(source, tmp_path):
    (source / INDEX).unlink()
    refused(source, tmp_path, "2 safetensors files but no")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[", '{"a":1,"a":2}'])
def test_wrong_index(source, tmp_path, index):
    (source / INDEX).write_text(index)
    refused(source, tmp_path, "no 'weight_map'|no valid JSON|occurs twice")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickle_checkpoints(source, tmp_path, name):
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    (source / name).write_bytes(pickle.dumps({}))
    refused(source, tmp_path, f"only pickle files .{name}., which can run code")


def test_empty_and_absent_directories(source, tmp_path):
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    refused(source, tmp_path, "neither .* nor a .safetensors file")
    refused(tmp_path / "nowhere", tmp_path, "no such directory")


def test_missing_tensors_are_listed(source, tmp_path):
    def remove(tensors):
        for name in [name for name in tensors if "audio_tower.layers" in name]:
            del tensors[name]

    edit_tensors(source, remove)
    with pytest.raises(CheckpointError, match="32 tensors are missing") as caught:
        convert_checkpoint(source, tmp_path / "out")
    assert str(caught.value).count("thinker.audio_tower.layers") == 10
    assert str(caught.value).endswith("...")


def test_missing_expert(source, tmp_path):
    edit_tensors(source, lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight") is None, shard=1)
    refused(source, tmp_path, f"1 tensors are missing:\n    {EXPERT}.up_proj.weight$")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("base_model.model.thinker.x.lora_A.weight", "LoRA adapters"),
        (f"{EXPERT}.up_proj.qweight", "AWQ or GPTQ"),
        (f"{EXPERT}.up_proj.weight_scale_inv", "FP8"),
        (f"{EXPERT}.up_proj.weight_scale", "quantised"),
        ("thinker.model.extra.weight", "1 tensors have no place in the model:\n    thinker.model.extra.weight$"),
    ],
)
def test_unexpected_tensors(source, tmp_path, name, hint):
    edit_tensors(source, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
    refused(source, tmp_path, hint)


def test_each_cause_is_named_by_its_own_tensors(source):
    names = ("thinker.model.rotary_emb.inv_freq", "talker.model.layers.0.x.lora_A.weight", "thinker.model.extra")
    edit_tensors(source, lambda tensors: tensors.update({name: np.zeros(3, np.float32) for name in names}))
    with pytest.raises(CheckpointError) as caught:
        plan_weights(open_checkpoint(source))
    said = str(caught.value)
    assert "LoRA adapters: merge them into the model and save it again:\n    talker.model.layers.0.x.lora_A" in said
    assert "1 tensors have no place in the model:\n    thinker.model.extra" in said
    assert "leave them out when saving, as save_pretrained does:\n    thinker.model.rotary_emb.inv_freq" in said


def test_speech_that_is_not_there(source, tmp_path):
    """A config that promises speech over a checkpoint that holds none, and the remedy followed."""
    for shard in (0, 1):
        edit_tensors(
            source, lambda t: [t.pop(name) for name in [*t] if not name.startswith("thinker.")] and None, shard
        )
    refused(source, tmp_path, r"tensors are missing; to convert what is there, ask for --parts thinker \(parts=")
    assert convert_checkpoint(source, tmp_path / "out", parts=("thinker",)).parts == ("thinker",)


def test_a_thinker_by_itself(source, tmp_path):
    def rename(tensors):
        for name in [*tensors]:
            tensor = tensors.pop(name)
            if name.startswith("thinker."):
                tensors[name.removeprefix("thinker.")] = tensor

    for shard in (0, 1):
        edit_tensors(source, rename, shard)
    refused(source, tmp_path, "are a Thinker by itself.*into the `thinker` of the whole model in transformers")
    edit_json(source / "config.json", lambda config: config["thinker_config"])
    edit_json(source / "config.json", lambda config: config.update(model_type="qwen3_omni_moe_thinker"))
    refused(source, tmp_path, "are a Thinker by itself")
    edit_json(source / "config.json", lambda config: config.update(model_type="qwen3_moe"))
    refused(source, tmp_path, "model_type is 'qwen3_moe'", ConfigError)


def test_speech_that_the_config_denies(source, tmp_path):
    edit_json(source / "config.json", lambda config: config.update(enable_audio_output=False))
    refused(source, tmp_path, r"have no place in the model; does config.json set enable_audio_output as it should\?")


def test_names_from_memory(source, tmp_path):
    fused = "thinker.model.layers.0.mlp.experts.gate_up_proj"
    for name in ("thinker.model.language_model.norm.weight", fused):
        edit_tensors(source, lambda tensors, name=name: tensors.update({name: np.zeros(3, np.float32)}))
        refused(source, tmp_path, "convert files written by save_pretrained")
        edit_tensors(source, lambda tensors, name=name: tensors.pop(name) is None)


def test_wrong_shape(source, tmp_path):
    name = f"{EXPERT}.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}), shard=1)
    refused(source, tmp_path, f"1 tensors have another shape:\n    {name} .80, 36., expected .36, 80.")


def test_config_of_another_size(source, tmp_path):
    def widen(config):
        config["thinker_config"]["text_config"]["moe_intermediate_size"] = 48

    edit_json(source / "config.json", widen)
    refused(source, tmp_path, "90 tensors have another shape")


def test_quantised_dtypes_are_refused_by_name(source, tmp_path):
    name = f"{EXPERT}.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}), shard=1)
    refused(source, tmp_path, f"unsupported dtype; only F32, F16, BF16 .*\n    {name} I8$")
    edit_header(source / "model-00002-of-00002.safetensors", lambda header: header[name].update(dtype="F8_E4M3"))
    refused(source, tmp_path, f"{name} F8_E4M3$")


def test_mixed_dtypes_need_a_choice(source, tmp_path):
    name = f"{EXPERT}.up_proj.weight"
    edit_tensors(source, lambda tensors: tensors.update({name: tensors[name].astype(ml_dtypes.bfloat16)}), shard=1)
    refused(source, tmp_path, f"talker/layers/moe/gate_up would mix dtypes .*{name} is BF16.*choose one with --dtype")
    convert_checkpoint(source, tmp_path / "cast", dtype="bfloat16")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights(source, tmp_path, value):
    name = f"{EXPERT}.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 4:6] = value

    edit_tensors(source, spoil, shard=1)
    refused(source, tmp_path, f"'{name}' holds 2 NaN or infinite values")
    with pytest.raises(CheckpointError, match=f"'{name}' holds 2 NaN or infinite values"):
        load(source)
    convert_checkpoint(source, tmp_path / "allowed", allow_nonfinite=True, verify=True)


def test_overflow_of_a_cast_is_nonfinite(source, tmp_path):
    def spoil(tensors):
        tensors["thinker.audio_tower.conv2d1.bias"][0] = 1e6

    edit_tensors(source, spoil)
    with pytest.raises(CheckpointError, match="holds 1 NaN or infinite values in float16"):
        convert_checkpoint(source, tmp_path / "out", dtype="float16")


def test_missing_and_foreign_configs(source, tmp_path):
    edit_json(source / "config.json", lambda config: config.update(model_type="qwen2_5_omni"))
    refused(source, tmp_path, f"^{source}/config.json: model_type is 'qwen2_5_omni'", ConfigError)
    with pytest.raises(ConfigError, match=f"^{source}/config.json: model_type is"):
        model_config(source)
    (source / "config.json").write_text("[]")
    refused(source, tmp_path, "no JSON object", ConfigError)
    (source / "config.json").unlink()
    refused(source, tmp_path, "config.json is missing", ConfigError)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_other_encodings_are_read(source, encoding):
    before = open_checkpoint(source)
    for name in ("config.json", INDEX):
        (source / name).write_text((source / name).read_text(), encoding)
    assert open_checkpoint(source) == before


def test_damaged_manifests_of_names(source, tmp_path, data_dir):
    packed = (data_dir / "tensor_manifest.json.gz").read_bytes()
    for content, what in ((packed[:5000], "damaged"), (b"{}", "damaged"), (packed[:100] + packed[200:], "damaged")):
        (source / "names.json.gz").write_bytes(content)
        with pytest.raises(CheckpointError, match=what):
            open_manifest(source / "names.json.gz")
    for content in ("[]", '{"tensors": 1}', '{"a": [1.5]}'):
        (source / "names.json").write_text(content)
        with pytest.raises(CheckpointError, match="not a mapping of tensor names to shapes"):
            open_manifest(source / "names.json")


def test_tied_head_that_is_there(source, tmp_path):
    def tie(config):
        config["thinker_config"]["tie_word_embeddings"] = True

    edit_json(source / "config.json", tie)
    refused(source, tmp_path, "ties it to the embedding: correct thinker_config.tie_word_embeddings")


def test_converted_checkpoints_are_not_converted_again(converted, tmp_path):
    refused(converted, tmp_path, "is converted already")


def test_code_is_never_run_or_copied(source, tmp_path):
    (source / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    edit_json(source / "config.json", lambda config: config.update(auto_map=auto_map))
    convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "out").glob("*.py"))


def test_a_file_that_shrinks_after_its_header_was_read(source):
    opened = open_checkpoint(source)
    (source / SHARD).write_bytes((source / SHARD).read_bytes()[:200_000])
    last = max(
        (t for t in opened.tensors if opened.tensors[t].file.name == SHARD), key=lambda t: opened.tensors[t].start
    )
    with pytest.raises(CheckpointError, match=f"ended while reading '{last}'"):
        opened.read(last)


def test_headers_are_what_the_library_reads(source):
    from safetensors import safe_open

    edit_header(source / SHARD, lambda header: header | {"__metadata__": {"format": "pt", "x": "y"}})
    opened = open_checkpoint(source)
    for file in source.glob("*.safetensors"):
        with safe_open(file, framework="np") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dict
                assert json.dumps(opened.tensors[name].shape) == json.dumps(reader.get_slice(name).get_shape())
                np.testing.assert_array_equal(opened.read(name), reader.get_tensor(name))


def test_what_other_programs_call_a_manifest(source):
    (source / "manifest.json").write_text('{"manifest_version": 3}')
    assert open_checkpoint(source).tensors
    (source / "manifest.json").write_text('{"format": 1, "leaves": {}}')
    with pytest.raises(CheckpointError, match="is converted already"):
        open_checkpoint(source)


def test_a_configuration_elsewhere_is_not_read(source, tmp_path):
    (tmp_path / "elsewhere").write_text("not even JSON")
    (source / "config.json").unlink()
    (source / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"config.json: leads to .*elsewhere, outside the checkpoint"):
        open_checkpoint(source)
