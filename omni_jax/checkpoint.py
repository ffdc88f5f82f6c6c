"""A checkpoint of ours on disk, written once and restored in pieces onto any mesh.

    config.json, tokenizer.json, ...   the model's own small files, byte for byte
    manifest.json                      format, shape and dtype of every array, SHA-256 of every tensor
    params/                            Orbax: the plain parameter tree, chunked so that one expert can be read alone

`convert` and training write it, `restore` reads it, and each device receives only its own pieces. Orbax guards its
structure but not its data: single flipped bits load silently, hence the hashes. A checkpoint is built under a hidden
name beside its destination and renamed when complete, so that nothing half-written ever bears the name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.pieces import piece_registry
from omni_jax.sharding import RULES

FORMAT = 1
MANIFEST, PARAMS, MARKER = "manifest.json", "params", ".unfinished"
CHUNK_BYTES = 8 << 20
METADATA_SUFFIXES = (".json", ".jinja", ".txt")
MAX_METADATA_BYTES = 64 << 20

Shardings = dict | Sharding | Callable[[str], Sharding] | None


@dataclass(frozen=True)
class LeafRecord:
    """Shape and dtype of one array, and SHA-256 by tensor: of the tensors it was made of, or of itself by its path."""

    shape: tuple[int, ...]
    dtype: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: a record for every array, by its path ("thinker/layers/qkv")."""

    leaves: dict[str, LeafRecord]

    @property
    def parts(self) -> tuple[str, ...]:
        """The sub-models present, in the order of the file."""
        return tuple(dict.fromkeys(path.split("/")[0] for path in self.leaves))


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a checkpoint; CheckpointError, with the remedy, for anything that is not a complete one."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory}: {_diagnosis(directory)}")
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {values['format']!r}, this version reads {FORMAT}; update omni_jax")
        leaves = {
            name: LeafRecord(tuple(int(n) for n in leaf["shape"]), str(np.dtype(leaf["dtype"])), dict(leaf["sha256"]))
            for name, leaf in values["leaves"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged ({str(error)[:100]}); convert the checkpoint again") from error
    if not (directory / PARAMS).is_dir():
        raise CheckpointError(f"{directory}: '{PARAMS}' is missing; copy the checkpoint completely or convert it again")
    return Manifest(leaves)


def read_config(directory: str | Path) -> OmniConfig:
    """The configuration of a checkpoint; CheckpointError if it is none of ours, ConfigError if config.json is wrong."""
    path = Path(directory) / "config.json"
    if not (path.parent / MANIFEST).is_file():
        raise CheckpointError(f"{directory}: {_diagnosis(path.parent)}")
    try:
        return OmniConfig.from_hf(json.loads(path.read_bytes()))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); convert the checkpoint again") from error


def check_shapes(directory: str | Path, declared: dict) -> None:
    """Compare the manifest with the shapes of a nested dict of declared arrays, without reading any data.

    CheckpointError naming the first array that is missing or differs: config.json and weights are of two models.
    """
    leaves = read_manifest(directory).leaves
    for path, array in flatten(declared).items():
        stored = leaves[path].shape if path in leaves else None
        if stored != array.shape:
            raise CheckpointError(
                f"{directory}: its config.json asks for {path} {list(array.shape)}, the checkpoint holds "
                f"{list(stored) if stored else 'none'}; restore the config.json that it was converted with"
            )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose other files are complete, and flush it to the disk."""
    leaves = {
        path: {"shape": list(leaf.shape), "dtype": leaf.dtype, "sha256": leaf.sha256}
        for path, leaf in manifest.leaves.items()
    }
    from omni_jax import __version__

    with (directory / MANIFEST).open("w") as stream:
        json.dump({"format": FORMAT, "omni_jax": __version__, "leaves": leaves}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def restore(
    directory: str | Path,
    parts: tuple[str, ...] | None = None,
    shardings: Shardings = None,
    dtype: str | None = None,
) -> dict:
    """Read a checkpoint's parameters as a nested dict of jax arrays; each device reads only its own pieces.

    parts: sub-models to read, default all. shardings: a tree of shardings, one for all, or a function of the path;
    default the first device. dtype: cast on the way, default as stored. CheckpointError if anything is missing,
    damaged or does not divide over the devices.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    leaves = select(read_manifest(directory), parts, directory)
    args = {}
    for path, leaf in leaves.items():
        sharding = sharding_of(shardings, path, leaf.shape)
        args[path] = ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=sharding, global_shape=leaf.shape, dtype=np.dtype(dtype or leaf.dtype)
        )
    wanted = ocp.args.PyTreeRestore(item=nest(dict.fromkeys(leaves, 0)), restore_args=nest(args), partial_restore=True)
    with explained(directory, unreadable(directory)):
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=piece_registry())
        tree = ocp.Checkpointer(handler).restore(directory / PARAMS, args=wanted)
    for path, value in flatten(tree).items():
        if not isinstance(value, jax.Array):
            raise CheckpointError(f"{directory / PARAMS}: array {path!r} is missing; convert the checkpoint again")
    return tree


def save(directory: str | Path, params: dict, metadata_from: str | Path, overwrite: bool = False) -> Manifest:
    """Write a nested dict of jax arrays as a checkpoint, with the small files of the directory `metadata_from`.

    Arrays may be sharded over several processes, which must all call this. Hashes are stored of arrays that this
    process sees whole. CheckpointError when the destination exists and is not ours to overwrite.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import type_handlers

    # Splitting the writing of replicated arrays over their devices, Orbax's default, takes a hundred times as long.
    handlers = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler(use_replica_parallel=False))
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=handlers)
    leaves = {
        path: LeafRecord(x.shape, str(x.dtype), {path: hash_array(x)} if x.is_fully_addressable else {})
        for path, x in flatten(params).items()
    }
    save_args = nest({path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in leaves})
    with publish(Path(directory), overwrite) as partial:
        with explained(partial, "written; is the disk full or read-only?"):
            ocp.Checkpointer(handler).save(partial / PARAMS, args=ocp.args.PyTreeSave(params, save_args=save_args))
        if jax.process_index() == 0:
            for path in metadata_files(Path(metadata_from)):
                shutil.copyfile(path, partial / path.name)
            write_manifest(partial, Manifest(leaves))
    return Manifest(leaves)


def hash_array(x: Any) -> str:
    """SHA-256 of an array's bytes in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).hexdigest()


@contextmanager
def publish(destination: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden directory that becomes `destination` when the block succeeds and disappears when it fails.

    What an interrupted run left behind is removed; a run in progress, a destination that exists, or (with `overwrite`)
    one that is not a checkpoint of ours raises CheckpointError.
    """
    destination = destination.absolute()
    partial = destination.parent / f".{destination.name}.partial"
    primary = jax.process_index() == 0
    lock = _claim(destination, partial, overwrite) if primary else None
    _barrier(f"claimed {partial}")
    try:
        yield partial
        _barrier(f"written {partial}")
        if primary:
            _rename(partial, destination)
    except BaseException as error:
        if primary:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{destination}: could not be written ({error.strerror or error})") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _barrier(f"published {partial}")


def metadata_files(directory: Path) -> list[Path]:
    """The small JSON, template and text files of a model; never weights, indices, manifests or code."""
    return [
        path
        for path in sorted(directory.iterdir())
        if path.suffix in METADATA_SUFFIXES
        and not path.name.endswith(".safetensors.index.json")
        and path.name != MANIFEST
        and path.is_file()
        and path.stat().st_size <= MAX_METADATA_BYTES
    ]


def chunk_shape(shape: tuple[int, ...], axes: tuple[str | None, ...], itemsize: int) -> tuple[int, ...]:
    """How to cut an array on disk: one layer or expert a chunk, then halved along the axes that meshes split."""
    chunk = [1 if axis in ("layers", "expert") else n for n, axis in zip(shape, axes, strict=True)]
    for i in sorted(range(len(shape)), key=lambda i: RULES.get(axes[i] or "") is None):
        while prod(chunk) * itemsize > CHUNK_BYTES and chunk[i] % 2 == 0:
            chunk[i] //= 2
    return tuple(chunk)


def select(manifest: Manifest, parts: tuple[str, ...] | None, directory: Path) -> dict[str, LeafRecord]:
    """The records of the requested parts; CheckpointError for a part that the checkpoint does not hold."""
    for part in parts or ():
        if part not in manifest.parts:
            raise CheckpointError(f"{directory}: holds no {part!r}, only {list(manifest.parts)}")
    return {p: leaf for p, leaf in manifest.leaves.items() if parts is None or p.split("/")[0] in parts}


def sharding_of(shardings: Shardings, path: str, shape: tuple[int, ...]) -> Sharding:
    """The sharding of one array; CheckpointError when none is given for it or its devices do not divide it."""
    if shardings is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    found: Any = shardings
    if isinstance(shardings, dict):
        found = flatten(shardings).get(path)
    elif not isinstance(shardings, Sharding):
        found = shardings(path)
    if not isinstance(found, Sharding):
        raise CheckpointError(f"no sharding is given for the array {path!r}")
    try:
        found.shard_shape(shape)
    except ValueError as error:
        raise CheckpointError(f"{path} {list(shape)} does not divide over the mesh: {error}") from error
    return found


@contextmanager
def explained(directory: Path, what: str) -> Iterator[None]:
    """Turn what Orbax raises into "the parameters cannot be `what`"; errors that explain themselves pass."""
    try:
        yield
    except (CheckpointError, MemoryError, OSError, jax.errors.JaxRuntimeError, TypeError, AttributeError):
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise CheckpointError(f"{directory}: the parameters cannot be {what} ({reason[0][:300]})") from error


def unreadable(directory: Path) -> str:
    """What cannot be done with a damaged checkpoint, and the remedy, for `explained`."""
    return f"read: `python -m convert --verify {directory}` names what is damaged; copy or convert it again"


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _claim(destination: Path, partial: Path, overwrite: bool) -> int:
    """Make the hidden directory ours, exclusively, and return the lock's descriptor."""
    import fcntl

    replaced = _replaced(destination)
    if replaced.exists() and not destination.exists():
        os.rename(replaced, destination)
    if destination.is_file():
        raise CheckpointError(f"{destination} is a file; choose another name")
    if destination.exists() and any(destination.iterdir()):
        if not overwrite:
            raise CheckpointError(f"{destination} exists; choose another name, or overwrite it with --overwrite")
        if not (destination / MANIFEST).is_file():
            raise CheckpointError(f"{destination} exists and is not a checkpoint of omni_jax; it is left alone")
    if partial.exists() and any(partial.iterdir()) and not (partial / MARKER).exists():
        raise CheckpointError(f"{partial} exists and is not an interrupted conversion; remove or rename it")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial / MARKER, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(partial / MARKER)  # Gone if the other process has just finished and renamed the directory.
    except OSError as error:
        os.close(lock)
        raise CheckpointError(f"{destination} is being written by another process") from error
    for path in partial.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return lock


def _rename(partial: Path, destination: Path) -> None:
    """Give a finished directory its name; a checkpoint that it replaces is moved aside first, and back if we die."""
    replaced = _replaced(destination)
    if destination.exists() and any(destination.iterdir()):
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(destination, replaced)
    os.rename(partial, destination)
    (destination / MARKER).unlink()
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.replaced"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _diagnosis(directory: Path) -> str:
    """Why a directory without a manifest is not a checkpoint of ours, and what to do."""
    if not directory.is_dir():
        return "no such directory"
    if (directory / MARKER).exists():
        return "an unfinished conversion; run it again"
    if any(p.suffix == ".safetensors" for p in directory.iterdir()):
        return f"a Hugging Face checkpoint; convert it with `python -m convert {directory} DST`, or use convert.load_hf"
    if (directory / PARAMS).exists():
        return f"'{MANIFEST}' is missing; copy the checkpoint completely or convert it again"
    return f"not a converted checkpoint ('{MANIFEST}' is missing)"
