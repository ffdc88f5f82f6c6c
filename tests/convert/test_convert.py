"""Whole conversions: there and back, interrupted, verified, within their memory, and next to direct loading."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import convert.convert
import omni_jax.weights.leaves
import omni_jax.weights.safetensors
from convert import MismatchError, convert_checkpoint, load_hf, reverse_checkpoint, verify_checkpoint
from convert.reverse import Entry, _shards, _write_at, _write_header, _write_index
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.sharding import make_mesh
from omni_jax.weights import checkpoint
from omni_jax.weights.blocks import count_nonfinite
from omni_jax.weights.contents import MARKER, metadata_files
from omni_jax.weights.keymap import table
from omni_jax.weights.manifest import SMALL_BYTES
from omni_jax.weights.plan import plan_weights
from omni_jax.weights.safetensors import open_checkpoint
from omni_jax.weights.trees import nest
from tests.convert.conftest import INDEX, as_first_format, edit_manifest, read_tensors
from tests.helpers.damage import flip

ROOT = Path(__file__).resolve().parent.parent.parent


def assert_same(a, b):
    def same(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    jax.tree.map(same, a, b)


def assert_nothing_left(directory: Path, *kept: str):
    assert sorted(p.name for p in directory.iterdir()) == sorted(kept)


@pytest.mark.parametrize("variant, dtype", [("small", "float32"), ("small", "bfloat16"), ("odd", "bfloat16")])
def test_there_and_back_is_bit_exact(tmp_path, variant, dtype):
    from scripts.small.checkpoint import make_checkpoint

    source = make_checkpoint(tmp_path / "source", variant, dtype=dtype, shards=3)
    convert_checkpoint(source, tmp_path / "ours", verify=True)
    reverse_checkpoint(tmp_path / "ours", tmp_path / "back", shard_bytes=2_000_000)
    before, after = read_tensors(source), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert (x.dtype, x.shape) == (after[name].dtype, after[name].shape) and x.tobytes() == after[name].tobytes(), (
            name
        )
    files = [p.name for p in source.iterdir() if p.suffix in (".json", ".jinja") and p.name != INDEX]
    assert len(files) >= 5
    for name in files:
        for directory in ("ours", "back"):
            assert (tmp_path / directory / name).read_bytes() == (source / name).read_bytes()
    assert len(open_checkpoint(tmp_path / "back").tensors) == len(before)
    sizes = [p.stat().st_size for p in (tmp_path / "back").glob("*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 2_100_000


def test_back_into_one_file_loads_in_transformers(converted, tmp_path, reference):
    torch = pytest.importorskip("torch")
    reverse_checkpoint(converted, tmp_path / "back")
    assert not (tmp_path / "back" / INDEX).exists()
    ours = type(reference("small")).from_pretrained(tmp_path / "back", dtype=torch.float32).state_dict()
    theirs = reference("small").state_dict()
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_loading_directly_equals_converting(checkpoints, converted):
    params, config = load_hf(checkpoints("small"))
    assert_same(params, checkpoint.restore(converted))
    assert config == checkpoint.read_config(converted)


def test_loading_onto_a_mesh_reads_every_block_once(checkpoints, monkeypatch):
    """Devices that share experts share their reading, and a device reads no expert of another."""
    mesh = make_mesh(jax.devices()[:6], expert=3, data=2)
    reads, asked = [], []
    real_box, real_group = omni_jax.weights.leaves.read_box, omni_jax.weights.leaves._Reader._group
    monkeypatch.setattr(omni_jax.weights.leaves, "read_box", lambda *a: reads.append((a[1].path, a[2])) or real_box(*a))
    monkeypatch.setattr(
        omni_jax.weights.leaves._Reader, "_group", lambda r, x, b: asked.append((r.leaf.path, x)) or real_group(r, x, b)
    )
    path = "thinker/layers/moe/down"

    source = open_checkpoint(checkpoints("small"))
    place = nest(
        {
            leaf.path: NamedSharding(mesh, PartitionSpec(*(None, "expert") * (leaf.path == path)))
            for leaf, _ in plan_weights(source, ("thinker",)).leaves
        }
    )
    params, _ = load_hf(checkpoints("small"), parts=("thinker",), shardings=place)
    assert len(reads) == len(set(reads))
    assert [ranges[1] for p, ranges in asked if p == path] == [(0, 2), (2, 4), (4, 6)]
    assert {s.data.shape[1] for s in params["thinker"]["layers"]["moe"]["down"].addressable_shards} == {2}


def test_loading_onto_every_axis_equals_loading_onto_one_device(checkpoints):
    whole, _ = load_hf(checkpoints("tiny"))
    params, _ = load_hf(checkpoints("tiny"), mesh="expert=2,tensor=2,fsdp=2")
    assert_same(params, whole)
    experts = params["thinker"]["layers"]["moe"]
    for name, parts in (("gate_up", 8), ("down", 8), ("router", 2)):
        assert {s.data.nbytes * parts for s in experts[name].addressable_shards} == {experts[name].nbytes}
    assert params["talker"]["layers"]["qkv"].addressable_shards[0].data.shape[1] == 1


@pytest.mark.parametrize(
    "path, axis, read",
    [
        ("layers/moe/gate_up", 4, 1),
        ("layers/moe/down", 2, 2),
        ("layers/qkv", 1, 1),
        ("layers/out", 2, 2),
        ("embed", 0, 1),
        ("vision/blocks/qkv/weight", 2, 2),
        ("layers/qkv", 2, 2),
    ],
)
def test_half_a_tensor_is_read_for_half_an_array(checkpoints, monkeypatch, path, axis, read):
    """Where the half is contiguous on disk, by rows; by columns, and of an axis that tensors share, all are read."""
    source = open_checkpoint(checkpoints("tiny"))
    leaf, kind = next(row for row in plan_weights(source).leaves if row[0].path == f"thinker/{path}")
    count, real = [], omni_jax.weights.safetensors._read_into
    monkeypatch.setattr(omni_jax.weights.safetensors, "_read_into", lambda *a: count.append(len(a[2])) or real(*a))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole = np.asarray(omni_jax.weights.leaves._Reader(source, leaf, kind, ThreadPoolExecutor(1), False).read(sharding))
    count.clear()
    half = [(0, n) if i != axis else (n // 2, n) for i, n in enumerate(leaf.shape)]
    depth = len(leaf.stack)
    reader = omni_jax.weights.leaves._Reader(source, leaf, kind, ThreadPoolExecutor(1), False)
    (piece,) = reader._group(tuple(half[:depth]), {tuple(half[depth:]): [jax.devices()[3]]})
    np.testing.assert_array_equal(piece, whole[tuple(slice(*span) for span in half)])
    assert sum(count) == read * piece.nbytes


@pytest.mark.parametrize("dtype, kind", [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_casting(checkpoints, tmp_path, dtype, kind):
    convert_checkpoint(checkpoints("small"), tmp_path / "ours", dtype=dtype, verify=True)
    reverse_checkpoint(tmp_path / "ours", tmp_path / "back")
    before, after = read_tensors(checkpoints("small")), read_tensors(tmp_path / "back")
    for name, x in before.items():
        np.testing.assert_array_equal(x.astype(kind), after[name])
    params, _ = load_hf(checkpoints("small"), dtype=dtype)
    assert_same(params, checkpoint.restore(tmp_path / "ours"))


def test_parts(checkpoints, tmp_path):
    manifest = convert_checkpoint(checkpoints("small"), tmp_path / "ours", parts=("thinker",))
    assert manifest.parts == ("thinker",) == checkpoint.read_manifest(tmp_path / "ours").parts
    assert set(checkpoint.restore(tmp_path / "ours")) == {"thinker"}
    verify_checkpoint(tmp_path / "ours")
    reverse_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert {name.split(".")[0] for name in read_tensors(tmp_path / "back")} == {"thinker"}
    with pytest.raises(InputError, match=r"parts \('talker',\): .* choose from these"):
        checkpoint.restore(tmp_path / "ours", parts=("talker",))
    with pytest.raises(InputError, match=r"parts \('vision',\): .* holds \['thinker', 'talker', 'code2wav'\]; choose"):
        convert_checkpoint(checkpoints("small"), tmp_path / "other", parts=("vision",))


@pytest.mark.parametrize(
    "name, transposed",
    [
        ("thinker.model.embed_tokens.weight", False),
        ("talker.model.layers.1.self_attn.k_proj.weight", False),
        ("thinker.model.layers.3.mlp.experts.4.down_proj.weight", True),
        ("code2wav.decoder.1.block.1.conv.weight", False),
    ],
)
def test_every_flipped_bit_is_found(checkpoints, converted, tmp_path, name, transposed):
    tensor = read_tensors(checkpoints("small"))[name]
    pattern = (np.ascontiguousarray(tensor.T) if transposed else tensor).tobytes()[:2000]
    for bit in (0, 8 * len(pattern) // 2 + 3, 8 * len(pattern) - 1):
        damaged = Path(shutil.copytree(converted, tmp_path / f"damaged-{bit}"))
        file = flip(damaged, pattern, bit)
        with pytest.raises(
            MismatchError, match=f"of 485 tensors, those that differ from what was written: 1;.*\n    {name}$"
        ):
            verify_checkpoint(damaged)
    if file.stat().st_size > SMALL_BYTES:  # Smaller files, in which a tensor may come to lie, are hashed at loading.
        checkpoint.restore(damaged, (name.split(".")[0],))  # Orbax sees nothing.
    with pytest.raises(MismatchError, match=f"{name} is not what was written"):
        reverse_checkpoint(damaged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_flipped_bit_in_the_index_of_the_data_is_found(converted, tmp_path):
    """Small tensors lie in the nodes of the store's tree, which carry checksums of their own."""
    tree = sorted((converted / "params" / "d").iterdir())
    assert tree
    for file in tree:
        for at in range(0, file.stat().st_size, file.stat().st_size // 5):
            damaged = Path(shutil.copytree(converted, tmp_path / "damaged", dirs_exist_ok=True))
            data = bytearray(file.read_bytes())
            data[at] ^= 16
            (damaged / "params" / "d" / file.name).write_bytes(data)
            with pytest.raises(CheckpointError):
                verify_checkpoint(damaged)


def test_manifest_and_config_must_agree(converted, tmp_path):
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    edit_manifest(damaged, lambda values: values["leaves"].pop("thinker/norm/weight") and None)
    with pytest.raises(MismatchError, match="1 arrays differ .* first thinker/norm/weight: .96,. and absent"):
        verify_checkpoint(damaged)


def test_truncated_data_is_found(converted, tmp_path):
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    largest = max((damaged / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with pytest.raises(MismatchError, match="bytes, .* were written"):
        verify_checkpoint(damaged)
    with pytest.raises(MismatchError, match="cannot be read"):
        verify_checkpoint(as_first_format(damaged))


KILLED = """
import os, signal, sys
import convert.convert as c
real, count = c.read_block, 0
def read_block(*args):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
c.read_block = read_block
import convert.stream
convert.stream.BATCH_BYTES = 1 << 20
c.convert_checkpoint(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("reads", [3, 400])
def test_killed_conversion_leaves_nothing_that_loads(checkpoints, converted, tmp_path, reads):
    command = [sys.executable, "-c", KILLED, str(checkpoints("small")), str(tmp_path / "ours"), str(reads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert_nothing_left(tmp_path, ".ours.partial")
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.restore(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="an unfinished conversion; run it again"):
        checkpoint.restore(tmp_path / ".ours.partial")
    convert_checkpoint(checkpoints("small"), tmp_path / "ours")
    assert_nothing_left(tmp_path, "ours")
    assert_same(checkpoint.restore(tmp_path / "ours"), checkpoint.restore(converted))


LIMITED = """
import resource, sys
import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    convert.convert_checkpoint(sys.argv[1], sys.argv[2])
except convert.convert.CheckpointError as error:
    print(error)
"""


def test_failing_disk_leaves_nothing(checkpoints, tmp_path):
    """Files that may not grow stand for a disk that is full."""
    command = [sys.executable, "-c", LIMITED, str(checkpoints("small")), str(tmp_path / "ours")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ours" in done.stdout and "written" in done.stdout
    assert_nothing_left(tmp_path)


def test_error_in_the_middle_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(convert.convert, "read_block", full)
    with pytest.raises(CheckpointError, match="ours: could not be written .No space left on device"):
        convert_checkpoint(checkpoints("small"), tmp_path / "ours")
    assert_nothing_left(tmp_path)


def test_too_little_room_is_seen_beforehand(checkpoints, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 13.\d MB, 1.0 MB are free"):
        convert_checkpoint(checkpoints("small"), tmp_path / "deep" / "down" / "ours")
    assert_nothing_left(tmp_path)


def test_destinations_that_exist(checkpoints, converted, tmp_path):
    ours = Path(shutil.copytree(converted, tmp_path / "ours"))
    with pytest.raises(CheckpointError, match="ours exists; choose another name"):
        convert_checkpoint(checkpoints("small"), ours)
    convert_checkpoint(checkpoints("small"), ours, parts=("thinker",), overwrite=True)
    assert checkpoint.read_manifest(ours).parts == ("thinker",)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="theirs exists"):
            convert_checkpoint(checkpoints("small"), tmp_path / "theirs", overwrite=overwrite)
        with pytest.raises(CheckpointError, match="exists"):
            convert_checkpoint(checkpoints("small"), checkpoints("small"), overwrite=overwrite)
    with pytest.raises(CheckpointError, match="theirs exists"):
        reverse_checkpoint(ours, tmp_path / "theirs")
    assert_nothing_left(tmp_path / "theirs", "thesis.txt")
    assert_nothing_left(tmp_path, "ours", "theirs")
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(CheckpointError, match="file is a file"):
        convert_checkpoint(checkpoints("small"), tmp_path / "file")
    (tmp_path / "empty").mkdir()
    convert_checkpoint(checkpoints("small"), tmp_path / "empty", parts=("thinker",))


@pytest.mark.parametrize(
    "name", ["a[1]", "back\\slash", "a*b?{c,d}", "gs:", "line\nbreak", "100%25", "日本 ñ", "not\udcffUTF-8"], ids=ascii
)
def test_every_name_of_a_folder_is_written_and_read(checkpoints, converted, tmp_path, name):
    """Libraries take some of these for patterns, separators or addresses."""
    ours = tmp_path / name / "ours"
    convert_checkpoint(checkpoints("small"), ours, parts=("code2wav",))
    assert verify_checkpoint(ours) == 136
    (tmp_path / name / name).mkdir()
    ours = ours.rename(tmp_path / name / name / name)
    assert_same(checkpoint.restore(ours), checkpoint.restore(converted, ("code2wav",)))
    params = jax.tree.map(jax.numpy.asarray, checkpoint.restore(ours))
    checkpoint.save(tmp_path / name / "saved", params, ours)
    assert_same(checkpoint.restore(tmp_path / name / "saved"), params)
    reverse_checkpoint(ours, tmp_path / name / "back")
    assert (tmp_path / name / "back" / "model.safetensors").exists()


def test_a_name_that_ends_in_a_colon(converted, tmp_path, monkeypatch):
    """Only with the names of the files in it does it look like an address."""
    ours = tmp_path / "ours:"
    ours.symlink_to(converted)
    assert checkpoint.restore(ours, ("code2wav",)).keys() == {"code2wav"} and verify_checkpoint(ours) == 485
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match="several processes cannot write below .* a name that ends in a colon"):
        checkpoint.save(tmp_path / "saved:", {}, converted)


def test_what_was_written_is_read_before_it_gets_its_name(checkpoints, tmp_path, monkeypatch):
    """Bytes that change on their way to the disk, where the hashes were taken before."""
    real = convert.convert.read_block

    def read_block(*args):
        block, hashes = real(*args)
        return block + np.float32(args[1].path == "code2wav/embed"), hashes

    monkeypatch.setattr(convert.convert, "read_block", read_block)
    with pytest.raises(
        MismatchError,
        match="of the first tensors, those that differ from what was written: 1;.*\n    code2wav.code_embedding.weight",
    ):
        convert_checkpoint(checkpoints("small"), tmp_path / "ours", parts=("code2wav",))
    assert_nothing_left(tmp_path)


def test_a_destination_around_the_source_is_left_alone(checkpoints, converted, tmp_path):
    ours = Path(shutil.copytree(converted, tmp_path / "ours"))
    source = Path(shutil.copytree(checkpoints("small"), ours / "hf"))
    with pytest.raises(CheckpointError, match="holds the checkpoint that is to be converted"):
        convert_checkpoint(source, ours, overwrite=True)
    assert source.exists()


def test_a_checkpoint_in_the_way_of_its_successor_is_put_back(checkpoints, converted, tmp_path):
    """Killed between the two renames of --overwrite, the old checkpoint is found again by the next run."""
    shutil.copytree(converted, tmp_path / ".ours.replaced")
    with pytest.raises(CheckpointError, match="ours exists"):
        convert_checkpoint(checkpoints("small"), tmp_path / "ours")
    assert_nothing_left(tmp_path, "ours")


def test_two_conversions_at_once(checkpoints, tmp_path):
    partial = tmp_path / ".ours.partial"
    partial.mkdir()
    with (partial / MARKER).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is being written by another process"):
            convert_checkpoint(checkpoints("small"), tmp_path / "ours")
    (partial / "stale.json").write_text("{}")
    convert_checkpoint(checkpoints("small"), tmp_path / "ours", parts=("code2wav",))
    assert not (tmp_path / "ours" / "stale.json").exists() and not partial.exists()
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not an interrupted conversion"):
        convert_checkpoint(checkpoints("small"), tmp_path / "ours", overwrite=True)
    assert_nothing_left(partial, "thesis.txt")


def test_nonfinite_values_are_counted():
    for dtype, largest in ((np.float32, 3.4e38), (np.float16, 6.5e4), (ml_dtypes.bfloat16, 3.3e38)):
        x = np.array([0, -0.0, 1, np.nan, np.inf, -np.inf, -largest, 1e-8, largest], np.float32).astype(dtype)
        assert count_nonfinite(x) == 3
        assert count_nonfinite(x.reshape(3, 3)[:1]) == 0


# The kernel's high-water mark; getrusage would report that of the process which started this one, if it is higher.
MEASURE = """
import re, sys
import jax, orbax.checkpoint, tensorstore, convert, convert.stream
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
jax.devices()
before = peak()
convert.convert_checkpoint(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


def write_large(directory: Path, small: Path, shard_bytes: int) -> tuple[int, int]:
    """A bfloat16 checkpoint of 345 MB, half of it in one array; returns its size and the largest array's."""
    directory.mkdir()
    for path in metadata_files(small):
        shutil.copyfile(path, directory / path.name)
    config = json.loads((small / "config.json").read_text())
    text = config["thinker_config"]["text_config"]
    text.update(hidden_size=512, num_hidden_layers=8, num_experts=16, moe_intermediate_size=640, vocab_size=36000)
    text.update(num_attention_heads=8, num_key_value_heads=2)
    config["thinker_config"]["vision_config"].update(
        depth=2, hidden_size=256, num_heads=4, intermediate_size=512, out_hidden_size=512, deepstack_visual_indexes=[0]
    )
    config["thinker_config"]["audio_config"].update(
        encoder_layers=2, d_model=256, encoder_attention_heads=4, encoder_ffn_dim=512, output_dim=512
    )
    config["enable_audio_output"] = False
    (directory / "config.json").write_text(json.dumps(config))
    bf16, rng = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    rows = table(OmniConfig.from_hf(config))
    entries = {
        name: Entry(bf16, source.shape)
        for leaf in rows
        for index in leaf.indices()
        for name, source in leaf.placements(index)
    }
    shards = _shards(entries, shard_bytes)
    for file, names in shards.items():
        with (directory / file).open("wb") as stream:
            for name, offset in _write_header(stream.fileno(), {name: entries[name] for name in names}).items():
                values = rng.integers(0, 0x7F00, entries[name].shape, np.uint16)
                _write_at(stream.fileno(), offset, values.view(bf16))
    _write_index(directory / INDEX, entries, shards)
    sizes = [2 * int(np.prod(leaf.shape)) for leaf in rows]
    return sum(sizes), max(sizes)


def test_peak_memory(tmp_path, checkpoints):
    """Converting holds less than the largest array and one shard more than the libraries themselves."""
    shard = 100_000_000
    total, largest = write_large(tmp_path / "source", checkpoints("tiny"), shard)
    assert total > largest + shard + 50_000_000
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "source"), str(tmp_path / "ours")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    print(f"peak {peak / 1e6:.0f} MB of {total / 1e6:.0f} MB, largest array {largest / 1e6:.0f} MB")
    assert 20_000_000 < peak < largest + shard


def test_relative_paths_work_both_ways(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").symlink_to(checkpoints("tiny"))
    convert_checkpoint("hf", "ckpt", progress=False)
    assert verify_checkpoint("ckpt") > 0
    assert reverse_checkpoint("ckpt", "back") > 0
    assert (tmp_path / "back" / "config.json").is_file()
