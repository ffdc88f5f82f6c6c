"""Read a converted checkpoint back and compare every tensor and every file with the hash that was stored for it.

Tensors are taken apart as for the way back to Hugging Face, so what is checked are the very bytes that were converted.
Arrays that training saved carry one hash for the whole array instead.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from omni_jax.errors import CheckpointError, MismatchError
from omni_jax.files import reason_of, user_path
from omni_jax.weights.blocks import THREADS, ahead, hash_tensor
from omni_jax.weights.checkpoint import read_config
from omni_jax.weights.contents import PARAMS, differences
from omni_jax.weights.keymap import table
from omni_jax.weights.layout import Index, Leaf
from omni_jax.weights.manifest import LeafRecord, Manifest, read_manifest, surplus


@dataclass(frozen=True)
class Taken:
    """A tensor out of a checkpoint, in its Hugging Face shape; `intact` is None where no hash was stored for it."""

    name: str
    tensor: np.ndarray
    intact: bool | None


# Reads the block of an array at an index, and takes the tensors out of it.
Read = Callable[[Index], tuple[np.ndarray, list[Taken]]]


def verify_checkpoint(directory: str | Path, progress: bool = False) -> int:
    """Check every tensor and file and return how many tensors were compared; MismatchError lists those that differ."""
    directory = user_path(directory, "the checkpoint").absolute()
    manifest = read_manifest(directory)
    _check(directory, "files", differences(directory, manifest.small_files(), inf))
    _check(directory, "files", differences(directory, manifest.array_files(), 0))
    _check(directory, "files", ((name, "was not written with it") for name in surplus(directory, manifest)))
    checked, wrong = 0, []
    try:
        for taken in take_all(directory, manifest, progress, "verify"):
            checked += taken.intact is not None
            if taken.intact is False:
                wrong.append((taken.name, ""))
    except CheckpointError:
        _check(directory, "files", differences(directory, manifest.files, inf))
        raise
    _check(directory, f"of {checked:,} tensors, those", wrong)
    _check(directory, "files", differences(directory, manifest.files, inf))
    return checked


def sample_checkpoint(directory: Path, manifest: Manifest) -> None:
    """Open a checkpoint and compare the first block of each array with its hashes; MismatchError names what differs."""
    with opened(directory, manifest) as arrays:
        first = [taken for leaf, read in arrays for taken in read(next(leaf.indices()))[1]]
    _check(directory, "of the first tensors, those", [(taken.name, "") for taken in first if taken.intact is False])


def _check(directory: Path, kind: str, found: Iterable[tuple[str, str]]) -> None:
    """MismatchError, with the first of them, unless nothing is wrong."""
    wrong = [f"\n    {name} {what}".rstrip() for name, what in found]
    if wrong:
        shown = "".join(wrong[:10]) + ("\n    ..." if len(wrong) > 10 else "")
        raise MismatchError(
            f"{directory}: {kind} that differ from what was written: {len(wrong):,}; copy or convert the checkpoint "
            f"again:{shown}"
        )


def rows_of(directory: Path, manifest: Manifest) -> list[Leaf]:
    """The rows of the key map that a checkpoint holds; MismatchError unless its config and manifest agree."""
    rows = [leaf for leaf in table(read_config(directory)) if leaf.path.split("/")[0] in manifest.parts]
    expected, recorded = {r.path: r.shape for r in rows}, {p: leaf.shape for p, leaf in manifest.leaves.items()}
    differing = sorted(p for p in expected.keys() | recorded.keys() if expected.get(p) != recorded.get(p))
    if differing:
        path = differing[0]
        raise MismatchError(
            f"{directory}: {len(differing)} arrays differ between config.json and the manifest, first {path}: "
            f"{expected.get(path, 'absent')} and {recorded.get(path, 'absent')}; restore the config.json that it was "
            "converted with"
        )
    return rows


@contextmanager
def opened(directory: Path, manifest: Manifest) -> Iterator[list[tuple[Leaf, Read]]]:
    """Every array of a checkpoint with a function that reads a block and takes the tensors out of it."""
    from convert.stream import open_leaves

    rows = rows_of(directory, manifest)
    with open_leaves(directory, [leaf.path for leaf in rows]) as stores:
        yield [(leaf, _reader(directory, leaf, manifest.leaves[leaf.path], stores[leaf.path])) for leaf in rows]


def take_all(directory: Path, manifest: Manifest, progress: bool, verb: str) -> Iterator[Taken]:
    """Every tensor of a checkpoint, array by array, and arrays hashed as a whole; a few blocks in memory at a time."""
    total = sum(prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in manifest.leaves.values())
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc=verb, disable=not progress) as bar,
        opened(directory, manifest) as arrays,
    ):
        for leaf, read in arrays:
            for taken in _take_leaf(leaf, manifest.leaves[leaf.path], read, pool):
                yield taken
                bar.update(taken.tensor.nbytes)


def _reader(directory: Path, leaf: Leaf, record: LeafRecord, store: Any) -> Read:
    dtype = np.dtype(record.dtype)
    if (getattr(store, "shape", None), getattr(store, "dtype", None)) != (leaf.shape, dtype):
        raise MismatchError(f"{directory / PARAMS}: array {leaf.path} is missing or not {record.dtype} {leaf.shape}")

    def read(index: Index) -> tuple[np.ndarray, list[Taken]]:
        try:
            block = store.read(index)
        except (ValueError, OSError) as error:
            raise MismatchError(
                f"{directory / PARAMS}: array {leaf.path} cannot be read ({reason_of(error)}); "
                "copy or convert the checkpoint again"
            ) from error
        return block, [_taken(leaf.take(block, place), name, record) for name, place in leaf.placements(index)]

    return read


def _take_leaf(leaf: Leaf, record: LeafRecord, read: Read, pool: ThreadPoolExecutor) -> Iterator[Taken]:
    dtype = np.dtype(record.dtype)
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
