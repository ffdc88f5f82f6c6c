"""Checkpoints that cannot be converted or loaded, and destinations that cannot be written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert import convert_checkpoint, load_hf, verify_checkpoint
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.inspection import Inspect, inspect
from omni_jax.loading import load
from omni_jax.weights.contents import MANIFEST, MARKER, PARAMS
from omni_jax.weights.plan import plan_weights
from omni_jax.weights.safetensors import open_checkpoint, open_manifest
from tests.bad_inputs.case import Case
from tests.convert.conftest import INDEX, as_first_format, edit_json, edit_manifest

SHARD = "model-00001-of-00002.safetensors"
TEXT = ("thinker_config", "text_config")


def _copy(directory: Path, copy: Path) -> Path:
    """A copy whose files can be replaced but not changed: its large files are the same ones."""
    return Path(shutil.copytree(directory, copy, copy_function=_link))


def _link(source: str, target: str) -> None:
    if os.path.getsize(source) > 1 << 20:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def _put(path: Path, data: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _source(name: str, damage: Callable[[Path], Any], *words: str) -> Case:
    """A Hugging Face checkpoint that conversion refuses before it reads any tensor."""

    def act(folder: Path, world: Any) -> None:
        damage(source := _copy(world.hf, folder / "hf"))
        convert_checkpoint(source, folder / "ours")

    return Case(f"source: {name}", act, words)


def _without_tensors(name: str, change: Callable[[dict[str, tuple[int, ...]]], Any], *words: str) -> Case:
    """Names and shapes only, as they are in the headers; the rest of the checkpoint is as it should be."""

    def act(folder: Path, world: Any) -> None:
        shapes = {name: list(tensor.shape) for name, tensor in open_checkpoint(world.hf).tensors.items()}
        (folder / "names.json").write_text(json.dumps(change(shapes) or shapes))
        plan_weights(open_manifest(folder / "names.json", world.hf / "config.json"))

    return Case(f"tensors: {name}", act, words, CheckpointError)


def _extra(name: str, *words: str) -> Case:
    return _without_tensors(name, lambda shapes: shapes.update({name: [3]}), name, "no place in the model", *words)


def _count(where: tuple[str, ...], value: Any) -> list[Case]:
    """A count in config.json beside other weights, at each door."""

    def change(values: dict) -> None:
        for key in where[:-1]:
            values = values[key]
        values[where[-1]] = value

    def damaged(directory: Path, folder: Path) -> Path:
        copy = _copy(directory, folder / "copy")
        edit_json(copy / "config.json", change)
        return copy

    doors: dict[str, Callable[[Path, Any], Any]] = {
        "convert": lambda folder, world: convert_checkpoint(damaged(world.hf, folder), folder / "ours"),
        "load_hf": lambda folder, world: load_hf(damaged(world.hf, folder)),
        "load": lambda folder, world: load(as_first_format(damaged(world.converted, folder))),
        "inspect": lambda folder, world: inspect(Inspect(as_first_format(damaged(world.converted, folder)))),
    }
    size = value if isinstance(value, int) else f"{len(value)} stages"
    words = (where[-1], "belongs to them")
    return [Case(f"count: {where[-1]} {size}, {door}", act, words, CheckpointError) for door, act in doors.items()]


def _ours(name: str, damage: Callable[[Path], Any], *words: str, act: Callable[[Path], Any] = load) -> Case:
    """A converted checkpoint that cannot be loaded."""

    def damaged(folder: Path, world: Any) -> None:
        directory = _copy(world.converted, folder / "ours")
        damage(directory)
        act(directory)

    return Case(f"converted: {name}", damaged, words, CheckpointError)


def _stated(config: Any) -> Callable[[Path], None]:
    return lambda source: edit_json(source / "config.json", lambda values: values.update(quantization_config=config))


def _quantised(config: dict[str, Any], field: str, value: Any, *words: str) -> Case:
    """A quantised checkpoint whose config.json states a field as nobody does."""
    words = (f"quantization_config.{field} is {value!r}", "take the unquantised release", *words)
    return _source(f"{field} {value!r}", _stated(config | {field: value}), *words)


def _to(name: str, destination: Callable[[Path], Any], *words: str, error: type = CheckpointError) -> Case:
    """A destination, seen before any tensor is read."""
    return Case(
        f"destination: {name}", lambda folder, world: convert_checkpoint(world.hf, destination(folder)), words, error
    )


def _made(path: Path, make: Callable[[Path], Any]) -> Path:
    make(path)
    return path


def _full(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def _header(header: bytes, data: bytes = b"\0" * 4) -> Callable[[Path], None]:
    return lambda source: _put(source / SHARD, struct.pack("<Q", len(header)) + header + data)


def _alone(shapes: dict) -> dict:
    return {name.removeprefix("thinker."): s for name, s in shapes.items() if name.startswith("thinker.")}


def _only_hidden(source: Path) -> None:
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.rename(source / f"._{path.name}")


def _pickles(source: Path) -> None:
    for path in [*source.glob("*.safetensors"), source / INDEX]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"PK")


def _largest(directory: Path) -> Path:
    return max((directory / PARAMS).rglob("d/*"), key=lambda path: path.stat().st_size)


def _elsewhere(index: dict) -> None:
    index["weight_map"]["thinker.more"] = "../b"


def _outside(source: Path) -> None:
    (source.parent / "notes.json").write_text("{}")
    (source / "notes.json").symlink_to(source.parent / "notes.json")


def _no_template(source: Path) -> None:
    (source / "chat_template.jinja").unlink()
    edit_json(source / "tokenizer_config.json", lambda values: values.pop("chat_template", None) and None)


def _zeros(directory: Path) -> None:
    path = _largest(directory)
    size = path.stat().st_size
    path.unlink()
    with path.open("wb") as file:
        file.truncate(size)


def _leaf(path: str = "thinker/more", **entry: Any) -> Callable[[Path], None]:
    record = {"shape": [1], "dtype": "float32", "sha256": {}} | entry
    return lambda d: edit_manifest(d, lambda values: values["leaves"].update({path: record}))


SOURCES = [
    Case("source: None", lambda folder, _: convert_checkpoint(None, folder), ("the source", "NoneType"), InputError),
    Case("source: a file", lambda f, w: load_hf(w.hf / "config.json"), ("not a directory", "the one that the file is")),
    Case("source: not there", lambda f, _: load_hf(f / "nowhere"), ("nowhere", "no such directory"), CheckpointError),
    Case("source: converted", lambda f, w: convert_checkpoint(w.converted, f / "a"), ("converted already", "load it")),
    Case("source: a cache", lambda f, _: (f / "snapshots").mkdir() or load_hf(f), ("Hugging Face cache", "snapshots")),
    _source("only what a Mac leaves", _only_hidden, "neither", "download"),
    _source("pickles", _pickles, "pytorch_model.bin", "safetensors"),
    _source(
        "a Git LFS pointer", lambda s: _put(s / SHARD, b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"
    ),
    _source("a login page", lambda s: _put(s / SHARD, b"<!DOCTYPE html><html>please log in"), SHARD, "HTML page"),
    _source("an empty shard", lambda s: _put(s / SHARD, b""), SHARD, "download it again"),
    _source("a shard cut short", lambda s: _put(s / SHARD, (s / SHARD).read_bytes()[:-9]), SHARD, "truncated, 9 bytes"),
    _source("a missing shard", lambda s: (s / SHARD).unlink(), SHARD, "is missing", "download"),
    _source("a folder as shard", lambda s: (s / SHARD).unlink() or (s / SHARD).mkdir(), SHARD, "not a regular file"),
    _source("a header of noise", _header(b"\xff\xfe\x00"), SHARD, "cannot be read as UTF-8", "download it again"),
    _source("a header 10,000 deep", _header(b'{"a":' + b"[" * 10_000), SHARD, "nested too deep"),
    _source("a header with a long number", _header(b'{"a":%s}' % (b"9" * 500)), SHARD, "500 digits"),
    _source("a header with a name twice", _header(b'{"a":1,"a":2}'), SHARD, "'a' occurs twice"),
    _source("an index that is a list", lambda s: _put(s / INDEX, "[]"), INDEX, "no 'weight_map'", "download it again"),
    _source("an index of other folders", lambda s: edit_json(s / INDEX, _elsewhere), "'../b'", "only files"),
    _source("no tokenizer", lambda s: (s / "tokenizer.json").unlink(), "no tokenizer", "copy"),
    _source("no template", _no_template, "no chat template", "copy"),
    _source("no configuration", lambda s: (s / "config.json").unlink(), "config.json is missing", "take it from"),
    _source("a configuration that is a list", lambda s: _put(s / "config.json", "[]"), "config.json", "no JSON object"),
    _source("settings that lead elsewhere", _outside, "notes.json", "copy"),
]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AUTO = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}
GROUPS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
QUANTISED = [
    *[_quantised(GPTQ, "dynamic", value, "not an object") for value in (False, True, 5, "+:.*mlp", ["+:.*mlp"])],
    *[_quantised(AUTO, "extra_config", value, "not an object") for value in (7, False, "lm_head", ["lm_head"])],
    *[_quantised(GROUPS, "config_groups", value, "not an object") for value in (None, 7, False, "group_0", [{}])],
    *[_quantised(GROUPS, "sparsity_config", value, "not an object") for value in (7, False, "dense", ["dense"])],
    _quantised(GPTQ, "desc_act", "false", "only False, True"),
    _quantised(GPTQ, "bits", [4], "only 4, 8"),
    _quantised(GPTQ, "group_size", {"lm_head": 64}, "a whole number above 0"),
    _quantised({"quant_method": "fp8"}, "weight_block_size", 128, "rows and columns"),
    _quantised({}, "quant_method", {"gptq": 4}, "only compressed-tensors, gptq"),
    *[
        _source(f"quantization_config {x!r}", _stated(x), "quantization_config is", "not an object")
        for x in (0, "gptq")
    ],
]

TENSORS = [
    _extra("base_model.model.thinker.x.lora_A.weight", "LoRA", "merge"),
    _extra("thinker.model.layers.0.mlp.gate_proj.modules_to_save.weight", "adapters", "merge"),
    _extra("thinker.model.layers.0.self_attn.q_proj.qweight", "AWQ or GPTQ", "unquantised"),
    _extra("thinker.model.layers.0.self_attn.q_proj.weight_scale_inv", "FP8", "unquantised"),
    _extra("thinker.model.layers.0.self_attn.q_proj.weight.absmax", "bitsandbytes", "unquantised"),
    _extra("thinker.model.layers.0.self_attn.q_proj.weight_packed", "quantised", "unquantised"),
    _extra("_orig_mod.thinker.model.norm.weight", "wrapped", "unwrap"),
    _extra("thinker.model.rotary_emb.inv_freq", "buffers", "leave them out"),
    _extra("code2wav.decoder.0.num_batches_tracked", "buffers", "leave them out"),
    _without_tensors("a Thinker by itself", _alone, "a Thinker by itself", "`thinker` of the whole model"),
    _without_tensors(
        "no speech", lambda s: {k: v for k, v in s.items() if k.startswith("thinker.")}, "missing", "--parts thinker"
    ),
    _without_tensors(
        "no head", lambda s: s.pop("thinker.lm_head.weight") and None, "lm_head", "thinker_config.tie_word_embeddings"
    ),
    _without_tensors("another shape", lambda s: s.update({"thinker.lm_head.weight": [2, 2]}), "[2, 2], expected"),
    _without_tensors("none", lambda _: {"tensors": {}}, "names.json", "not a mapping"),
    _without_tensors("shapes that are none", lambda _: {"a": [-1]}, "names.json", "not a mapping"),
    Case(
        "tensors: a manifest that is not there",
        lambda f, _: open_manifest(f / "a"),
        ("no such file", "name a directory"),
    ),
    Case("tensors: a manifest None", lambda *_: open_manifest(None), ("the manifest", "NoneType"), InputError),
]

COUNTS = [
    *_count((*TEXT, "num_hidden_layers"), 10**9),
    *_count((*TEXT, "num_experts"), 10**6),
    *_count(("thinker_config", "vision_config", "depth"), 10**9),
    *_count(("talker_config", "num_code_groups"), 10**12),
    *_count(("code2wav_config", "upsampling_ratios"), [2] * 300),
]

CONVERTED = [
    Case("converted: None", lambda *_: load(None), ("the model", "NoneType"), InputError),
    Case("converted: a file", lambda f, w: load(w.hf / "config.json"), ("not a directory", "the one that the file is")),
    Case("converted: not there", lambda f, _: load(f / "nowhere"), ("nowhere", "no such directory"), CheckpointError),
    Case("converted: neither", lambda f, _: load(f), ("config.json is missing", "take it from"), ConfigError),
    Case("converted: its form is needed", lambda f, w: verify_checkpoint(w.hf), ("python -m convert", "omni_jax.load")),
    Case("converted: parts of others", lambda f, w: load(w.converted, parts=("ears",)), ("ears", "choose"), InputError),
    Case("converted: no parts", lambda f, w: load(w.converted, parts=()), ("choose from these",), InputError),
    _ours("unfinished", lambda d: (d / MANIFEST).rename(d / MARKER), "unfinished", "run it again"),
    _ours("without its manifest", lambda d: (d / MANIFEST).unlink(), MANIFEST, "copy the checkpoint completely"),
    _ours("without its arrays", lambda d: shutil.rmtree(d / PARAMS), "'params' is missing", "copy"),
    _ours("an empty manifest", lambda d: _put(d / MANIFEST, ""), MANIFEST, "copy it again"),
    _ours("a manifest that is a list", lambda d: _put(d / MANIFEST, "[]"), MANIFEST, "copy it again"),
    _ours("a manifest that is a folder", lambda d: (d / MANIFEST).unlink() or (d / MANIFEST).mkdir(), "regular file"),
    _ours("of the future", lambda d: _put(d / MANIFEST, '{"format": 9}'), "format 9", "update omni_jax"),
    _ours("a format that is text", lambda d: _put(d / MANIFEST, '{"format": "2"}'), MANIFEST, "copy it again"),
    _ours("an edited manifest", lambda d: edit_json(d / MANIFEST, lambda v: v.update(omni_jax="9")), "differs", "copy"),
    _ours("an array of another model", _leaf(), "thinker/more", act=lambda d: verify_checkpoint(d)),
    _ours("an array within an array", _leaf("thinker/embed/more"), "array 'thinker/embed/more'", "copy it again"),
    _ours("an array of objects", _leaf(dtype="object"), "dtype 'object'"),
    _ours("an array of 10^20 values", _leaf(shape=[10**20]), "100000000000000000000", "no size"),
    _ours("an array of half a value", _leaf(shape=[0.5]), "'0.5' is no size"),
    _ours("a changed configuration", lambda d: _put(d / "config.json", "{}"), "config.json", "restore the file"),
    _ours(
        "without its tokenizer", lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json", "is missing", "restore"
    ),
    _ours("another template", lambda d: _put(d / "chat_template.jinja", "{{1}}"), "chat_template.jinja", "restore"),
    _ours("one more template", lambda d: _put(d / "chat_template.json", "{}"), "chat_template.json", "move it away"),
    _ours("without its structure", lambda d: (d / PARAMS / "_METADATA").unlink(), "_METADATA is missing", "--verify"),
    _ours(
        "a structure of another", lambda d: _put(d / PARAMS / "_METADATA", "{}"), "_METADATA has 2 bytes", "--verify"
    ),
    _ours("a data file cut short", lambda d: _put(_largest(d), b"\0"), "has 1 bytes", "--verify"),
    _ours("a data file of zeros", _zeros, "differ from what", "copy or convert", act=lambda d: verify_checkpoint(d)),
    _ours("a strange array file", lambda d: _put(d / PARAMS / "x", ""), "params/x", act=lambda d: verify_checkpoint(d)),
]

DESTINATIONS = [
    _to("None", lambda _: None, "the destination", "NoneType", error=InputError),
    _to("empty", lambda _: "", "the destination", "empty", error=InputError),
    _to("a null character", lambda f: f"{f}/a\0b", "null character", error=InputError),
    _to("a file", lambda f: _made(f / "a", Path.touch), "is a file", "another name"),
    _to("a pipe", lambda f: _made(f / "a", os.mkfifo), "is a file", "another name"),
    _to("below a file", lambda f: _made(f / "a", Path.touch) / "b", "not a directory", "another name"),
    _to("a long name", lambda f: f / ("a" * 300), "name too long", "another name"),
    _to("a long path", lambda f: f.joinpath(*["a" * 200] * 20), "too long", "choose"),
    _to("a link to itself", lambda f: _made(f / "a", lambda a: a.symlink_to(a)), "cannot be written", "another name"),
    _to("a folder with other things", lambda f: _made(f / "a", _full), "not a checkpoint", "another name"),
    _to("where no folder can be", lambda _: "/proc/a", "/proc/a", "another"),
    _to("hidden things in the way", lambda f: _made(f / ".a.partial", _full).parent / "a", "remove or rename it"),
    Case("destination: a checkpoint", lambda f, w: convert_checkpoint(w.hf, w.converted), ("exists", "--overwrite")),
    Case("destination: its source", lambda f, w: convert_checkpoint(w.hf, w.hf, overwrite=True), ("not a checkpoint",)),
]

CASES = [*SOURCES, *QUANTISED, *TENSORS, *COUNTS, *CONVERTED, *DESTINATIONS]
