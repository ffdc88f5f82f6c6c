"""Orbax leaves written and read block by block, so that no array is ever whole in memory.

Orbax lets a type of leaf bring its own handler. `StreamedLeaf` is an array that does not exist yet: its handler asks
for block after block and writes each into the leaf's TensorStore, with a bound on the bytes not yet on disk. Orbax does
the rest: the tree's metadata, its temporary directory, merging and committing. What results is an ordinary Orbax
checkpoint; anyone may restore it without this module.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from omni_jax.weights.contents import PARAMS
from omni_jax.weights.orbax_paths import UNWRITABLE, explained, plain_path, unreadable
from omni_jax.weights.trees import flatten, nest

BATCH_BYTES = 32 << 20


@dataclass
class StreamedLeaf:
    """An array to be written: shape, dtype, chunks on disk, and its blocks as (index of the leading axes, values)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    blocks: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]

    @property
    def size(self) -> int:
        """How many values; Orbax asks for its statistics."""
        return prod(self.shape)


@dataclass
class OpenLeaf:
    """An array on disk, to be read by blocks."""

    store: ts.TensorStore
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """How many values; Orbax asks for its statistics."""
        return prod(self.shape)

    def read(self, index: tuple[int, ...]) -> np.ndarray:
        """The block at `index` of the leading axes, of the shape of the others; ValueError for damaged files."""
        return self.store[index].read().result()


class _Handler(type_handlers.NumpyHandler):
    """Writes StreamedLeaf as what a NumPy array becomes, and restores arrays as OpenLeaf."""

    async def serialize(
        self,
        values: Sequence[StreamedLeaf],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        batch = _Batch()
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = type_handlers.get_json_tspec_write(info, True, leaf.shape, leaf.chunks, leaf.dtype, process_index=0)
            spec["metadata"]["chunks"], spec["dtype"] = list(leaf.chunks), leaf.dtype.name
            array = await batch.open(spec, info.ts_context)
            for index, block in leaf.blocks():
                for start, part in _parts(block, leaf.chunks[len(index)]):
                    await array[(*index, slice(start, start + len(part)))].write(
                        part, can_reference_source_data_indefinitely=True
                    )
                    if await batch.committed(part.nbytes):
                        array = await batch.open(spec, info.ts_context)
        await batch.commit()
        return []

    async def deserialize(
        self, infos: Sequence[type_handlers.ParamInfo], args: Sequence[type_handlers.RestoreArgs] | None = None
    ) -> Sequence[OpenLeaf]:
        leaves = []
        for info in infos:
            spec = ts.Spec(type_handlers.get_json_tspec_read(info, use_ocdbt=True))
            store = await ts.open(spec, open=True, context=info.ts_context or ts.Context())
            leaves.append(OpenLeaf(store, store.shape, store.dtype.numpy_dtype))
        return leaves


class _Batch:
    """Writes gathered in a transaction, committed whenever it holds `BATCH_BYTES`.

    Without transactions, every write would rewrite the store's index: three times the bytes, four times as slow.
    """

    def __init__(self) -> None:
        self.transaction, self.bytes = ts.Transaction(), 0

    async def open(self, spec: dict[str, Any], context: ts.Context | None) -> ts.TensorStore:
        """The array of `spec` in the current transaction, created if it does not exist."""
        return await ts.open(
            ts.Spec(spec), create=True, open=True, context=context or ts.Context(), transaction=self.transaction
        )

    async def committed(self, written: int) -> bool:
        """Count the bytes written; True if the transaction was full and a new one has begun."""
        self.bytes += written
        if self.bytes < BATCH_BYTES:
            return False
        await self.commit()
        return True

    async def commit(self) -> None:
        """Put everything on disk and begin a new transaction."""
        await self.transaction.commit_async()
        self.transaction, self.bytes = ts.Transaction(), 0


def _parts(block: np.ndarray, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a block into parts of about BATCH_BYTES, whole chunks of `step` rows each; with their starts."""
    rows = step * max(1, BATCH_BYTES * len(block) // (step * block.nbytes))
    for start in range(0, len(block), rows):
        yield start, block[start : start + rows]


def _checkpointer() -> ocp.Checkpointer:
    handlers = (StreamedLeaf, _Handler()), (jax.Array, type_handlers.ArrayHandler())  # Orbax warns without the second.
    registry = type_handlers.create_type_handler_registry(*handlers)
    # Weights hardly compress, and uncompressed chunks load several times faster.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry))


def write_leaves(directory: Path, leaves: dict[str, StreamedLeaf]) -> None:
    """Save leaves, by path, as the Orbax checkpoint of a directory."""
    with explained(directory, UNWRITABLE, OSError), plain_path(directory) as plain:
        _checkpointer().save(plain / PARAMS, args=ocp.args.PyTreeSave(nest(leaves)))


@contextmanager
def open_leaves(directory: Path, paths: Sequence[str]) -> Iterator[dict[str, OpenLeaf]]:
    """The arrays of a directory's Orbax checkpoint by path, open for reading; of a missing one there is no OpenLeaf."""
    item = nest(dict.fromkeys(paths, 0))
    args = nest({path: ocp.RestoreArgs(restore_type=StreamedLeaf) for path in paths})
    wanted = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    with plain_path(directory) as plain:
        with explained(directory, unreadable(directory)):
            leaves = flatten(_checkpointer().restore(plain / PARAMS, args=wanted))
        yield leaves
