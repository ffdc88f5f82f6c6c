"""Hugging Face checkpoint -> checkpoint of ours: source -> plan -> blocks -> Orbax, a few blocks in memory at a time.

Leaf after leaf is read from the shards at the offsets that their headers give and streamed into Orbax. Peak memory is a
few blocks (one expert, or one layer's projection; the embedding table is the largest) and the bytes that are being
written, whatever the size of the model.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert.blocks import THREADS, ahead, read_block
from convert.layout import Index, Leaf
from convert.plan import Plan, plan
from convert.source import SourceCheckpoint, check_inside, open_checkpoint
from omni_jax.checkpoint import (
    PARAMS,
    LeafRecord,
    Manifest,
    chunk_shape,
    metadata_files,
    publish,
    write_manifest,
)
from omni_jax.errors import CheckpointError
from omni_jax.process import check, finishing


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    parts: tuple[str, ...] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    verify: bool = False,
    progress: bool = False,
) -> Manifest:
    """Convert the checkpoint directory `source` into `destination`, which appears complete or not at all.

    parts: sub-models to keep, default all. dtype: cast to it, default as in the source. verify: read everything back
    and compare hashes before the destination appears. progress: a bar on stderr. CheckpointError names what is wrong.
    """
    opened = open_checkpoint(source)
    made = plan(opened, parts, dtype)
    destination = Path(destination)
    _check_space(destination, made.bytes)
    with finishing(), publish(destination, overwrite) as partial:
        for path in metadata_files(opened.directory):
            check_inside(path, opened.directory.resolve())
            shutil.copyfile(path, partial / path.name)
        manifest = _write_params(opened, made, partial / PARAMS, allow_nonfinite, progress)
        write_manifest(partial, manifest)
        if verify:
            from convert.verify import verify_checkpoint

            verify_checkpoint(partial, progress)
        check()
    return manifest


def _write_params(
    source: SourceCheckpoint, made: Plan, directory: Path, allow_nonfinite: bool, progress: bool
) -> Manifest:
    """Stream all leaves into Orbax and return their records."""
    from convert.stream import StreamedLeaf, write_leaves

    records: dict[str, LeafRecord] = {}
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=made.bytes, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
    ):

        def blocks(leaf: Leaf, dtype: np.dtype) -> Iterator[tuple[Index, np.ndarray]]:
            record = records[leaf.path] = LeafRecord(leaf.shape, dtype.name, {})

            def read(index: Index) -> tuple[np.ndarray, dict[str, str]]:
                return read_block(source, leaf, index, dtype, allow_nonfinite)

            bytes_ahead = 2 * prod(leaf.block) * dtype.itemsize
            for index, (block, hashes) in ahead(pool, read, leaf.indices(), bytes_ahead):
                record.sha256.update(hashes)
                yield index, block
                bar.update(block.nbytes)

        leaves = {}
        for leaf, dtype in made.leaves:
            chunks = chunk_shape(leaf.shape, leaf.axes, dtype.itemsize)
            leaves[leaf.path] = StreamedLeaf(
                leaf.shape, dtype, chunks, lambda leaf=leaf, dtype=dtype: blocks(leaf, dtype)
            )
        write_leaves(directory, leaves)
    return Manifest({leaf.path: records[leaf.path] for leaf, _ in made.leaves})


def _check_space(destination: Path, needed: int) -> None:
    """Refuse before the first byte what cannot fit."""
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{destination}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; choose another disk"
        )
