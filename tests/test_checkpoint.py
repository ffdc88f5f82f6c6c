"""Restoring checkpoints onto devices, saving them, and every way in which a directory is not one."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert import convert_checkpoint, load_hf, reverse_checkpoint, verify_checkpoint
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.sharding import make_mesh, shardings
from omni_jax.weights import checkpoint
from omni_jax.weights.checkpoint import chunk_shape, restore, save
from omni_jax.weights.parts import declare_parts
from omni_jax.weights.shard_handler import read_shards
from omni_jax.weights.trees import flatten, nest
from tests.convert.conftest import as_first_format, edit_manifest


@pytest.fixture(scope="module")
def ours(checkpoints, tmp_path_factory) -> Path:
    """The "tiny" checkpoint converted, for reading only; its sizes divide by two and four."""
    directory = tmp_path_factory.mktemp("converted") / "tiny"
    convert_checkpoint(checkpoints("tiny"), directory)
    return directory


@pytest.fixture
def damaged(ours, tmp_path) -> Path:
    """A private copy."""
    return Path(shutil.copytree(ours, tmp_path / "damaged"))


def test_restored_pieces_lie_on_their_devices(ours, checkpoints):
    mesh = make_mesh(jax.devices(), expert=4, tensor=2)
    axes = declare_parts(checkpoint.read_config(ours))["thinker"].axes
    params = restore(ours, parts=("thinker",), shardings=shardings({"thinker": axes}, mesh))
    whole, _ = load_hf(checkpoints("tiny"), parts=("thinker",))
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    placed, _ = load_hf(checkpoints("tiny"), ("thinker",), shardings=shardings({"thinker": axes}, mesh))
    jax.tree.map(np.testing.assert_array_equal, placed, whole)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, placed, params))
    gate_up = params["thinker"]["layers"]["moe"]["gate_up"]
    L, E, D, _, F = gate_up.shape
    reference = np.asarray(whole["thinker"]["layers"]["moe"]["gate_up"])
    for shard in gate_up.addressable_shards:
        assert shard.data.shape == (L, E // 4, D, 2, F // 2)
        np.testing.assert_array_equal(shard.data, reference[shard.index])
    assert len({str(shard.index) for shard in gate_up.addressable_shards}) == 8
    assert params["thinker"]["layers"]["qkv"].addressable_shards[0].data.shape[1] == 1
    assert params["thinker"]["norm"]["weight"].sharding.is_fully_replicated


def by_path(directory: Path, place: Callable[[str], NamedSharding]) -> dict:
    """The tree of shardings that a function of the path gives."""
    return nest({path: place(path) for path in checkpoint.read_manifest(directory).leaves})


def test_sharding_by_path_and_for_all(ours):
    mesh = make_mesh(jax.devices()[:2], expert=2)
    split, whole = NamedSharding(mesh, PartitionSpec(None, "expert")), NamedSharding(mesh, PartitionSpec())
    params = restore(ours, ("talker",), by_path(ours, lambda path: split if "moe/down" in path else whole))
    assert params["talker"]["layers"]["moe"]["down"].sharding == split
    assert params["talker"]["embed"].sharding == whole
    params = restore(ours, ("talker",), whole)
    assert {x.sharding for x in jax.tree.leaves(params)} == {whole}
    assert restore(ours, ("code2wav",))["code2wav"]["embed"].devices() == {jax.devices()[0]}


def test_casting_on_the_way(ours):
    as_stored, cast = restore(ours, ("code2wav",)), restore(ours, ("code2wav",), dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(as_stored)} == {"float32"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype("bfloat16"), b), as_stored, cast)


def test_each_piece_is_read_once_for_the_devices_that_want_it():
    values, reads = np.arange(24.0).reshape(6, 4), []

    class Store:
        shape = values.shape

        def __getitem__(self, index):
            async def read():
                reads.append(index)
                return values[index]

            return SimpleNamespace(read=read)

    mesh = make_mesh(jax.devices(), expert=2, data=4)
    array = asyncio.run(read_shards(Store(), NamedSharding(mesh, PartitionSpec("expert")), np.float32))
    assert reads == [(slice(0, 3), slice(0, 4)), (slice(3, 6), slice(0, 4))]
    np.testing.assert_array_equal(array, values)
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 4)} and len(array.devices()) == 8


def test_meshes_that_do_not_fit(ours):
    mesh = make_mesh(jax.devices()[:5], expert=5)
    split = by_path(ours, lambda p: NamedSharding(mesh, PartitionSpec(*(None, "expert") * ("moe/down" in p))))
    with pytest.raises(CheckpointError, match=r"talker/layers/moe/down .* does not divide over the mesh"):
        restore(ours, ("talker",), split)
    with pytest.raises(CheckpointError, match="no sharding is given for the array 'talker/"):
        restore(ours, ("talker",), {"talker": {}})


def test_saved_checkpoints_are_restored_verified_and_converted_back(ours, tmp_path):
    mesh = make_mesh(jax.devices(), expert=4, tensor=2)
    params = restore(ours, shardings=NamedSharding(mesh, PartitionSpec()))
    params["thinker"]["layers"]["moe"]["down"] = jax.device_put(
        params["thinker"]["layers"]["moe"]["down"] + 1, NamedSharding(mesh, PartitionSpec(None, "expert", "tensor"))
    )
    manifest = save(tmp_path / "saved", params, ours)
    assert manifest == checkpoint.read_manifest(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, params, restore(tmp_path / "saved"))
    assert verify_checkpoint(tmp_path / "saved") == len(manifest.leaves)
    reverse_checkpoint(tmp_path / "saved", tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, params, load_hf(tmp_path / "back")[0])
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (ours / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match="saved exists"):
        save(tmp_path / "saved", params, ours)
    save(
        tmp_path / "saved",
        {"thinker": {"x": np.zeros(3)}} | {"thinker": {"x": jax.numpy.zeros(3)}},
        ours,
        overwrite=True,
    )
    assert restore(tmp_path / "saved")["thinker"]["x"].shape == (3,)


def test_what_was_saved_is_read_before_it_gets_its_name(ours, tmp_path, monkeypatch):
    params = restore(ours, ("code2wav",))
    monkeypatch.setattr(checkpoint, "_read", lambda *_: {"code2wav": {"decoder": {"alpha": np.zeros(3)}}})
    manifest = checkpoint.read_manifest(ours)
    assert "code2wav/decoder/alpha" in manifest.leaves
    with pytest.raises(CheckpointError, match="code2wav/decoder/alpha reads differently"):
        save(tmp_path / "saved", params, ours)
    with pytest.raises(CheckpointError, match="nowhere: no such directory; name the checkpoint"):
        save(tmp_path / "saved", params, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_flipped_bits_of_saved_checkpoints_are_found(ours, tmp_path):
    from tests.helpers.damage import flip

    params = restore(ours, ("thinker",))
    save(tmp_path / "saved", params, ours)
    flip(tmp_path / "saved", np.asarray(params["thinker"]["vision"]["pos_embed"]).tobytes()[:1000], 4321)
    with pytest.raises(
        CheckpointError,
        match="of .* tensors, those that differ from what was written: 1;.*\n    thinker/vision/pos_embed$",
    ):
        verify_checkpoint(tmp_path / "saved")


PROCESS = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec
from omni_jax.weights import checkpoint
from omni_jax.sharding import make_mesh
from omni_jax.weights.trees import nest
mesh = make_mesh(jax.devices(), expert=2)
split = NamedSharding(mesh, PartitionSpec(None, "expert"))
whole = NamedSharding(mesh, PartitionSpec())
paths = [path for path in checkpoint.read_manifest(sys.argv[3]).leaves if path.startswith("talker/")]
place = nest({path: split if "moe" in path else whole for path in paths})
params = checkpoint.restore(sys.argv[3], ("talker",), place)
assert not params["talker"]["layers"]["moe"]["down"].is_fully_addressable
checkpoint.save(sys.argv[4], params, sys.argv[3])
"""


def test_two_processes_save_together(ours, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROCESS, str(port)]
    root = Path(__file__).resolve().parent.parent
    processes = [
        subprocess.Popen(
            [*command, str(i), str(ours), str(tmp_path / "saved")], cwd=root, env=environment, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    jax.tree.map(np.testing.assert_array_equal, restore(ours, ("talker",)), restore(tmp_path / "saved"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]


def test_directories_that_are_not_checkpoints(checkpoints, tmp_path, damaged):
    with pytest.raises(CheckpointError, match="no such directory"):
        restore(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"a Hugging Face checkpoint; convert it with `python -m convert .* DST`"):
        restore(checkpoints("tiny"))
    with pytest.raises(CheckpointError, match="a Hugging Face checkpoint"):
        checkpoint.read_config(checkpoints("tiny"))
    with pytest.raises(CheckpointError, match="not a converted checkpoint"):
        restore(tmp_path)
    (damaged / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="'manifest.json' is missing"):
        restore(damaged)


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "leaves": {"a": {}}}', "damaged"),
        ('{"format": 1, "leaves": {"a": {"shape": [1], "dtype": "float33", "sha256": {}}}}', "damaged"),
        ('{"format": 2, "leaves": {}}', "damaged"),
        ('{"format": 3, "leaves": {}}', "format 3, this version reads 1 to 2; update omni_jax"),
    ],
)
def test_damaged_manifests(damaged, text, match):
    (damaged / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=match):
        restore(damaged)


def edit_leaf(directory: Path, path: str, **changes: object) -> None:
    def edit(values: dict) -> None:
        values["leaves"].setdefault(path, {"shape": [2], "dtype": "float32", "sha256": {}}).update(changes)

    edit_manifest(directory, edit)


def test_missing_arrays_and_wrong_shapes(damaged):
    edit_leaf(damaged, "thinker/more/weight")
    with pytest.raises(CheckpointError, match="array 'thinker/more/weight' is missing"):
        restore(damaged)
    with pytest.raises(CheckpointError, match="thinker/more/weight"):
        verify_checkpoint(damaged)
    assert restore(damaged, ("talker",))
    with pytest.raises(CheckpointError, match=r"asks for thinker/more/weight none, .* holds \[2\]; restore"):
        checkpoint.open_converted(damaged)
    assert set(checkpoint.open_converted(damaged, ("talker",)).declarations) == {"talker"}
    edit_leaf(damaged, "talker/embed", shape=[1536, 200])
    with pytest.raises(CheckpointError, match=r"cannot be read: .*has shape .*, not \[1536, 200\]"):
        restore(damaged, ("talker",))


def test_missing_and_truncated_files(damaged):
    largest = max((damaged / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 1000)
    with pytest.raises(CheckpointError, match=r"cannot be read: `python -m convert --verify .*damaged"):
        restore(damaged)
    largest.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore(damaged)
    (damaged / "params" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="cannot be read|missing"):
        restore(damaged)
    shutil.rmtree(damaged / "params")
    with pytest.raises(CheckpointError, match="'params' is missing"):
        restore(damaged)


def test_config_of_a_checkpoint(ours, damaged):
    assert checkpoint.read_config(ours).talker is not None
    (damaged / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="config.json: has 2 bytes"):
        checkpoint.read_config(damaged)
    with pytest.raises(ConfigError, match=f"^{damaged}/config.json: model_type is None"):
        checkpoint.read_config(as_first_format(damaged))
    (damaged / "config.json").unlink()
    with pytest.raises(CheckpointError, match="config.json: there is no such file"):
        checkpoint.read_config(damaged)


def test_chunks_isolate_layers_experts_and_the_axes_that_meshes_split():
    experts = ("layers", "expert", "embed", None, "mlp")
    assert chunk_shape((48, 128, 2048, 2, 768), experts, 2) == (1, 1, 2048, 2, 768)
    qkv = ("layers", "kv_heads", None, "head_dim", "embed")
    assert chunk_shape((48, 4, 10, 128, 2048), qkv, 2) == (1, 1, 10, 128, 2048)
    assert chunk_shape((152064, 2048), ("vocab", "embed"), 2) == (1188, 2048)
    assert chunk_shape((7, 3), (None, None), 4) == (7, 3)


def test_trees_are_flattened_and_nested():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nest(flatten(tree)) == tree
