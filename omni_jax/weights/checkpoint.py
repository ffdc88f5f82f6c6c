"""A converted checkpoint on disk: written once, restored shard by shard onto any mesh.

    config.json, tokenizer.json, ...   the model's own small files, byte for byte
    manifest.json                      every array and file with its hash (`manifest`)
    params/                            Orbax: the plain parameter tree, chunked so that one expert can be read alone

`convert` writes it, `restore` reads it, and each device receives only its own shards. Orbax protects its
structure but not its data: single flipped bits load silently, hence the hashes. `publish` makes it appear complete or
not at all.
"""

from dataclasses import replace
from math import prod
from pathlib import Path

import jax
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.files import read_object, user_path
from omni_jax.sharding import RULES
from omni_jax.weights.blocks import hash_tensor
from omni_jax.weights.contents import MAX_METADATA_BYTES, PARAMS, copy_metadata, differences, metadata_files
from omni_jax.weights.counts import check_counts
from omni_jax.weights.manifest import (
    COPY_AGAIN,
    SMALL_BYTES,
    LeafRecord,
    Manifest,
    read_manifest,
    surplus,
    write_manifest,
)
from omni_jax.weights.orbax_paths import UNWRITABLE, explained, is_misread, plain_path, unreadable
from omni_jax.weights.parts import choose_parts, declare_parts
from omni_jax.weights.publish import publish
from omni_jax.weights.shard_handler import shard_registry
from omni_jax.weights.shards import Shardings, sharding_of
from omni_jax.weights.stored import StoredModel
from omni_jax.weights.trees import flatten, nest

CHUNK_BYTES = 8 << 20


def read_config(directory: str | Path) -> OmniConfig:
    """The configuration of a checkpoint, without the parts that it does not hold, once its small files are checked.

    CheckpointError if it is not a converted checkpoint or a file has changed, ConfigError for a wrong config.json.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, what in differences(directory, manifest.small_files(), MAX_METADATA_BYTES):
        raise CheckpointError(f"{directory / name}: {what}; restore the file, or convert the checkpoint again")
    for name in surplus(directory, manifest):
        if not name.startswith(f"{PARAMS}/"):
            raise CheckpointError(f"{directory / name}: was not there when the checkpoint was written; move it away")
    file = directory / "config.json"
    values = read_object(file, remedy=COPY_AGAIN)
    longest = max((n for leaf in manifest.leaves.values() for n in leaf.shape), default=0)
    check_counts(values, manifest.leaves, longest, directory)
    config = OmniConfig.from_hf(values, str(file))
    return replace(config, **{part: None for part in ("talker", "code2wav") if part not in manifest.parts})


def open_converted(directory: Path, parts: tuple[str, ...] | None = None, dtype: str | None = None) -> StoredModel:
    """A converted checkpoint as a model that can be loaded: `parts` of it (default: all), in `dtype` or as stored.

    InputError for parts that it does not hold; CheckpointError and ConfigError as `read_config` and `check_shapes`.
    """
    config, manifest = read_config(directory), read_manifest(directory)
    chosen = choose_parts(parts, manifest.parts, directory)
    declarations = declare_parts(config, chosen)
    check_shapes(directory, {part: declaration.shapes for part, declaration in declarations.items()})
    types = {path: leaf.held_as(dtype) for path, leaf in _records(manifest, chosen).items()}

    def read(shardings: Shardings) -> dict:
        return restore(directory, chosen, shardings, dtype)

    return StoredModel(directory, "converted checkpoint", config, declarations, types, read)


def check_shapes(directory: str | Path, declared: dict) -> None:
    """Compare the manifest with the shapes that some parts declare, a dict of trees, without reading any data.

    CheckpointError naming the first array that is missing, differs or has no place: config.json and weights are of two
    models.
    """
    stored = {p: leaf.shape for p, leaf in read_manifest(directory).leaves.items() if p.split("/")[0] in declared}
    expected = {path: tuple(array.shape) for path, array in flatten(declared).items()}
    for path in sorted(expected.keys() | stored.keys()):
        asked, found = (list(shapes[path]) if path in shapes else "none" for shapes in (expected, stored))
        if asked != found:
            raise CheckpointError(
                f"{directory}: its config.json asks for {path} {asked}, the checkpoint holds {found}; restore the "
                "config.json that it was converted with"
            )


def restore(
    directory: str | Path,
    parts: tuple[str, ...] | None = None,
    shardings: Shardings = None,
    dtype: str | None = None,
) -> dict:
    """Read a converted checkpoint's parameters as a nested dict of jax arrays; each device reads only its own shards.

    Args:
        directory: the converted checkpoint.
        parts: which parts to read, default all.
        shardings: a tree of shardings, or one for all; default the first device.
        dtype: what to cast to on the way, default as stored.

    InputError for parts that it does not hold; CheckpointError if anything is missing, damaged or does not divide over
    the devices.
    """
    directory = user_path(directory, "the checkpoint").absolute()
    manifest = read_manifest(directory)
    for name, what in differences(directory, manifest.array_files(), SMALL_BYTES):
        raise CheckpointError(f"{directory}: the parameters cannot be {unreadable(directory)} ({name} {what})")
    return _read(directory, _records(manifest, choose_parts(parts, manifest.parts, directory)), shardings, dtype)


def save(directory: str | Path, params: dict, metadata_from: str | Path, overwrite: bool = False) -> Manifest:
    """Write a nested dict of jax arrays as a checkpoint, with the small files of the directory `metadata_from`.

    Arrays may be sharded over several processes, which must all call this. Hashes are stored for arrays of which this
    process holds every shard.

    Args:
        directory: the destination, which appears complete or not at all.
        params: the arrays, with the shapes that the modules declare.
        metadata_from: the checkpoint that the parameters began as.
        overwrite: replace the destination if it is a converted checkpoint.

    Returns the manifest, which knows the files (`Manifest.files`) in the first process only. CheckpointError when the
    destination cannot be written, or exists and is not to be replaced.
    """
    if jax.process_count() > 1 and is_misread(Path(directory).absolute()):
        raise CheckpointError(f"{directory}: several processes cannot write below [, \\ or a name that ends in a colon")
    metadata = user_path(metadata_from, "the checkpoint that the parameters began as")
    if not metadata.is_dir():
        raise CheckpointError(f"{metadata}: no such directory; name the checkpoint that the parameters began as")
    with publish(directory, overwrite, sum(x.nbytes for x in flatten(params).values())) as partial:
        leaves = {
            path: LeafRecord(x.shape, str(x.dtype), {path: hash_tensor(x)} if x.is_fully_addressable else {})
            for path, x in flatten(params).items()
        }
        _write(partial, params)
        if jax.process_index():
            return Manifest(leaves)
        copy_metadata(metadata_files(metadata), partial)
        manifest = write_manifest(partial, leaves)
        if jax.process_count() == 1:
            _sample(partial, manifest)
        return manifest


def _read(directory: Path, leaves: dict[str, LeafRecord], shardings: Shardings, dtype: str | None) -> dict:
    """Some arrays of a checkpoint by their records, as `restore`."""
    import orbax.checkpoint as ocp

    args = {}
    for path, leaf in leaves.items():
        sharding = sharding_of(shardings, path, leaf.shape)
        args[path] = ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=np.dtype(leaf.held_as(dtype))
        )
    wanted = ocp.args.PyTreeRestore(item=nest(dict.fromkeys(leaves, 0)), restore_args=nest(args), partial_restore=True)
    with explained(directory, unreadable(directory)), plain_path(directory) as plain:
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=shard_registry())
        tree = ocp.Checkpointer(handler).restore(plain / PARAMS, args=wanted)
    for path, value in flatten(tree).items():
        if not isinstance(value, jax.Array):
            raise CheckpointError(f"{directory / PARAMS}: array {path!r} is missing; convert the checkpoint again")
    return tree


def _write(directory: Path, params: dict) -> None:
    """Save arrays as the Orbax checkpoint of a directory."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    # Splitting the writing of replicated arrays over their devices, Orbax's default, takes a hundred times as long.
    handlers = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler(use_replica_parallel=False))
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=handlers)
    save_args = nest({path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in flatten(params)})
    with explained(directory, UNWRITABLE, OSError), plain_path(directory) as plain:
        ocp.Checkpointer(handler).save(plain / PARAMS, args=ocp.args.PyTreeSave(params, save_args=save_args))


def _sample(directory: Path, manifest: Manifest) -> None:
    """Read the smallest array of each part back; CheckpointError unless it is what was written."""
    smallest = {
        path.split("/")[0]: path for path in sorted(manifest.leaves, key=lambda p: -prod(manifest.leaves[p].shape))
    }
    read = flatten(_read(directory, {path: manifest.leaves[path] for path in smallest.values()}, None, None))
    for path, array in read.items():
        if manifest.leaves[path].sha256.get(path) not in (None, hash_tensor(array)):
            raise CheckpointError(f"{directory}: {path} reads differently from what was written; is the disk faulty?")


def chunk_shape(shape: tuple[int, ...], axes: tuple[str | None, ...], itemsize: int) -> tuple[int, ...]:
    """How to cut an array of `shape` on disk: a layer or expert per chunk, then halved along axes that meshes split."""
    chunk = [1 if axis in ("layers", "expert") else n for n, axis in zip(shape, axes, strict=True)]
    for i in sorted(range(len(shape)), key=lambda i: RULES.get(axes[i] or "") is None):
        while prod(chunk) * itemsize > CHUNK_BYTES and chunk[i] % 2 == 0:
            chunk[i] //= 2
    return tuple(chunk)


def _records(manifest: Manifest, parts: tuple[str, ...]) -> dict[str, LeafRecord]:
    """The records of some parts."""
    return {path: leaf for path, leaf in manifest.leaves.items() if path.split("/")[0] in parts}
