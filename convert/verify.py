"""Read a checkpoint of ours back and compare every tensor with the hash that was stored when it was written.

Tensors are taken apart as for the way back to Hugging Face, so what is checked are the very bytes that were converted.
Arrays that training saved carry one hash for the whole array instead.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convert.blocks import THREADS, ahead, hash_tensor
from convert.keymap import table
from convert.layout import Index, Leaf
from convert.source import read_config
from omni_jax.checkpoint import PARAMS, LeafRecord, Manifest, read_manifest
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError


class MismatchError(CheckpointError):
    """Stored data that is not what was written."""


@dataclass(frozen=True)
class Taken:
    """A tensor out of a checkpoint, as on a Hugging Face disk; `intact` is None where no hash was stored for it."""

    name: str
    tensor: np.ndarray
    intact: bool | None


def verify_checkpoint(directory: str | Path, progress: bool = False) -> int:
    """Check every tensor and return how many hashes were compared; MismatchError lists those that differ."""
    directory = Path(directory).absolute()
    checked, wrong = 0, []
    for taken in take_all(directory, read_manifest(directory), progress, "verify"):
        checked += taken.intact is not None
        if taken.intact is False:
            wrong.append(taken.name)
    if wrong:
        shown = "".join(f"\n    {name}" for name in wrong[:10]) + ("\n    ..." if len(wrong) > 10 else "")
        raise MismatchError(
            f"{directory}: {len(wrong):,} of {checked:,} tensors are not what was written; convert them again:{shown}"
        )
    return checked


def rows_of(directory: Path, manifest: Manifest) -> list[Leaf]:
    """The rows of the key map that a checkpoint holds; MismatchError unless its config and manifest agree."""
    config = OmniConfig.from_hf(read_config(directory / "config.json"))
    rows = [leaf for leaf in table(config) if leaf.path.split("/")[0] in manifest.parts]
    expected, recorded = {r.path: r.shape for r in rows}, {p: leaf.shape for p, leaf in manifest.leaves.items()}
    differing = sorted(p for p in expected.keys() | recorded.keys() if expected.get(p) != recorded.get(p))
    if differing:
        path = differing[0]
        raise MismatchError(
            f"{directory}: {len(differing)} arrays differ between config.json and the manifest, first {path}: "
            f"{expected.get(path, 'absent')} and {recorded.get(path, 'absent')}"
        )
    return rows


def take_all(directory: Path, manifest: Manifest, progress: bool, verb: str) -> Iterator[Taken]:
    """Every tensor of a checkpoint, array by array, and arrays hashed as a whole; a few blocks in memory at a time."""
    from convert.stream import open_leaves

    rows = rows_of(directory, manifest)
    stores = open_leaves(directory / PARAMS, [leaf.path for leaf in rows])
    total = sum(prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in manifest.leaves.values())
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc=verb, disable=not progress) as bar,
    ):
        for leaf in rows:
            for taken in _take_leaf(directory, leaf, manifest.leaves[leaf.path], stores[leaf.path], pool):
                yield taken
                bar.update(taken.tensor.nbytes)


def _take_leaf(
    directory: Path, leaf: Leaf, record: LeafRecord, store: Any, pool: ThreadPoolExecutor
) -> Iterator[Taken]:
    dtype = np.dtype(record.dtype)
    if (getattr(store, "shape", None), getattr(store, "dtype", None)) != (leaf.shape, dtype):
        raise MismatchError(f"{directory / PARAMS}: array {leaf.path} is missing or not {record.dtype} {leaf.shape}")

    def read(index: Index) -> tuple[np.ndarray, list[Taken]]:
        try:
            block = store.read(index)
        except ValueError as error:
            raise MismatchError(f"{directory / PARAMS}: array {leaf.path} cannot be read ({error})") from error
        return block, [_taken(leaf.take(block, place), name, record) for name, place in leaf.placements(index)]

    whole = hashlib.sha256() if leaf.path in record.sha256 else None
    for _, (block, tensors) in ahead(pool, read, leaf.indices(), 2 * prod(leaf.block) * dtype.itemsize):
        yield from tensors
        if whole:
            whole.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    if whole:
        yield Taken(leaf.path, np.empty(0, dtype), whole.hexdigest() == record.sha256[leaf.path])


def _taken(tensor: np.ndarray, name: str, record: LeafRecord) -> Taken:
    expected = record.sha256.get(name)
    return Taken(name, tensor, None if expected is None else hash_tensor(tensor) == expected)
