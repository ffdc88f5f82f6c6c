"""Blocks of leaves out of a source checkpoint: read, placed, cast, hashed and checked, a few ahead of their use."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from omni_jax.errors import CheckpointError
from omni_jax.process import check
from omni_jax.sharding import Array
from omni_jax.weights.layout import Box, Index, Leaf, place_shape
from omni_jax.weights.safetensors import SourceCheckpoint

# Blocks that are read ahead: at most one per thread, and at most this number of bytes.
THREADS = 8
AHEAD_BYTES = 64 << 20
# Values that are looked at together for infinities, so that no mask of a whole tensor is made.
SCAN_VALUES = 1 << 20

# The exponent bits of each dtype's unsigned view: all of them set means infinity or NaN.
EXPONENTS = {"float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00)}

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_block(
    source: SourceCheckpoint, leaf: Leaf, index: Index, dtype: np.dtype, allow_nonfinite: bool = False
) -> tuple[np.ndarray, dict[str, str]]:
    """One block of a leaf, of shape `leaf.block`, in `dtype`, and the SHA-256 of each tensor in it, after a cast.

    CheckpointError for NaN and infinite values, unless `allow_nonfinite`.
    """
    placements = leaf.placements(index)
    block, hashes = np.empty(0, dtype), {}
    for name, place in placements:
        tensor = source.read(name)
        if len(placements) == 1 and tensor.dtype == dtype and not place.transposed:
            block = tensor.reshape(leaf.block)  # The tensor is the block: a large embedding need not exist twice.
        else:
            block = block if block.size else np.empty(leaf.block, dtype)
            leaf.put(block, place, tensor)
        stored = tensor if tensor.dtype == dtype else leaf.take(block, place)
        if not allow_nonfinite:
            _refuse_nonfinite(source, name, stored)
        hashes[name] = hash_tensor(stored)
    return block, hashes


def read_box(
    source: SourceCheckpoint, leaf: Leaf, index: Index, box: Box, out: np.ndarray, allow_nonfinite: bool = False
) -> None:
    """Write the part of one block that is inside a readable `box` to `out`, of the box's shape, in its dtype.

    Other rows of the tensors are neither read nor checked for NaN.
    """
    for name, place in leaf.placements(index):
        rows, inside = leaf.part(place, box)
        tensor = source.read(name, rows)
        with np.errstate(over="ignore"):
            out[place.at] = place.unpacked(tensor, place_shape(leaf.block, place.at), rows)[inside]
        if not allow_nonfinite:
            same = tensor.dtype == out.dtype
            _refuse_nonfinite(source, name, tensor if same else np.ascontiguousarray(out[place.at]))


def _refuse_nonfinite(source: SourceCheckpoint, name: str, stored: np.ndarray) -> None:
    bad = count_nonfinite(stored)
    if bad:
        raise CheckpointError(
            f"{source.tensors[name].file}: {name!r} holds {bad:,} NaN or infinite values in {stored.dtype.name}; "
            "the weights are damaged or overflow (or pass --allow-nonfinite)"
        )


def hash_tensor(tensor: Array) -> str:
    """SHA-256 of the bytes of an array [...] in row-major order, which are those of the safetensors file."""
    return hashlib.sha256(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data).hexdigest()


def count_nonfinite(tensor: np.ndarray) -> int:
    """The number of values of an array [...] that are NaN or infinite; whole numbers are neither."""
    if np.issubdtype(tensor.dtype, np.integer):
        return 0
    unsigned, exponent = EXPONENTS[tensor.dtype.name]
    bits = tensor.reshape(-1).view(unsigned)
    parts = (bits[i : i + SCAN_VALUES] for i in range(0, bits.size, SCAN_VALUES))
    return sum(int(np.count_nonzero((part & unsigned(exponent)) == exponent)) for part in parts)


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], item_bytes: int
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in order, computed by threads at most THREADS items and AHEAD_BYTES ahead.

    A command that was interrupted ends here, between two items.
    """
    items, running = iter(items), deque[tuple[Item, Future[Result]]]()
    depth = max(1, min(THREADS, AHEAD_BYTES // max(1, item_bytes)))
    try:
        while True:
            for item in islice(items, depth - len(running)):
                running.append((item, pool.submit(function, item)))
            if not running:
                return
            check()
            item, future = running.popleft()
            yield item, future.result()
    finally:
        for _, future in running:
            future.cancel()
