"""Converted checkpoint -> Hugging Face checkpoint: the same tensors, names and small files, bit for bit.

Blocks are read in the order of the arrays and each tensor is written to its place in its shard, whose header is known
beforehand; nothing is collected in memory. Stored hashes are checked on the way, so damage is not passed on.
"""

import json
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from convert.verify import rows_of, take_all
from omni_jax.errors import CheckpointError, MismatchError
from omni_jax.files import user_path
from omni_jax.process import finishing
from omni_jax.weights.contents import copy_metadata, metadata_files
from omni_jax.weights.destination import place_of
from omni_jax.weights.headers import DTYPE_NAMES
from omni_jax.weights.manifest import read_manifest
from omni_jax.weights.publish import publish
from omni_jax.weights.safetensors import INDEX

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: dtype, shape and size in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def reverse_checkpoint(
    source: str | Path,
    destination: str | Path,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    overwrite: bool = False,
) -> int:
    """Write the converted checkpoint `source` as safetensors and JSON into `destination`; return the tensors written.

    Args:
        source: the converted checkpoint.
        destination: the directory to be written.
        shard_bytes: the most bytes of tensors in a file; a larger tensor has a file of its own.
        progress: show a bar on stderr.
        overwrite: replace a converted checkpoint, but never the source.

    MismatchError when data is damaged.
    """
    source = user_path(source, "the source").absolute()
    manifest = read_manifest(source)
    entries = {
        name: Entry(np.dtype(manifest.leaves[leaf.path].dtype), place.shape)
        for leaf in rows_of(source, manifest)
        for index in leaf.indices()
        for name, place in leaf.placements(index)
    }
    shards = _shards(entries, shard_bytes)
    if place_of(destination).final in (source.resolve(), *source.resolve().parents):
        raise CheckpointError(f"{destination}: holds the checkpoint that is to be converted; choose another name")
    needed = sum(entry.nbytes for entry in entries.values())
    with finishing(), publish(destination, overwrite, needed) as partial, ExitStack() as stack:
        small = [p for p in metadata_files(source) if not manifest.files or p.name in manifest.files]
        copy_metadata(small, partial)
        places: dict[str, tuple[int, int]] = {}
        for file, names in shards.items():
            descriptor = os.open(partial / file, os.O_CREAT | os.O_WRONLY, 0o644)
            stack.callback(os.close, descriptor)
            offsets = _write_header(descriptor, {name: entries[name] for name in names})
            places.update({name: (descriptor, offset) for name, offset in offsets.items()})
        for taken in take_all(source, manifest, progress, "reverse"):
            if taken.intact is False:
                raise MismatchError(f"{source}: {taken.name} is not what was written; convert the checkpoint again")
            if taken.name in places:
                _write_at(*places[taken.name], taken.tensor)
        if len(shards) > 1:
            _write_index(partial / INDEX, entries, shards)
    return len(entries)


def _shards(entries: dict[str, Entry], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, filled in the natural order of names; wider dtypes first in a file, for alignment."""
    if shard_bytes < 1:
        raise CheckpointError(f"shard size {shard_bytes}: must be positive")
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(entries, key=_natural):
        if groups[-1] and size + entries[name].nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += entries[name].nbytes
    if len(groups) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    ordered = (sorted(group, key=lambda name: -entries[name].dtype.itemsize) for group in groups)
    return dict(zip(files, ordered, strict=True))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key by which layer 2 comes before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _write_header(descriptor: int, entries: dict[str, Entry]) -> dict[str, int]:
    """Write a safetensors header, size the file, and return where in it each tensor's bytes belong."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at, starts = 0, {}
    for name, entry in entries.items():
        starts[name] = at
        span = [at, at + entry.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        at += entry.nbytes
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    os.write(descriptor, len(data).to_bytes(8, "little") + data)
    os.ftruncate(descriptor, 8 + len(data) + at)
    return {name: 8 + len(data) + start for name, start in starts.items()}


def _write_at(descriptor: int, offset: int, tensor: np.ndarray) -> None:
    view = tensor.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], offset + done)


def _write_index(path: Path, entries: dict[str, Entry], shards: dict[str, list[str]]) -> None:
    total = sum(entry.nbytes for entry in entries.values())
    parameters = sum(prod(entry.shape) for entry in entries.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
