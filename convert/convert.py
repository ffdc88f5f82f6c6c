"""Hugging Face checkpoint -> converted checkpoint: source -> plan -> blocks -> Orbax, a few blocks in memory at a time.

Leaf after leaf is read from the shards at the offsets that their headers give and streamed into Orbax. Peak memory is a
few blocks (one expert, or one layer's projection; the embedding table is the largest) and the bytes that are being
written, whatever the size of the model.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from omni_jax.errors import CheckpointError
from omni_jax.files import write_whole
from omni_jax.inputs.processor import Processor
from omni_jax.process import check, finishing
from omni_jax.weights.blocks import THREADS, ahead, read_block
from omni_jax.weights.checkpoint import chunk_shape
from omni_jax.weights.contents import copy_metadata, metadata_files
from omni_jax.weights.destination import place_of
from omni_jax.weights.hf import as_asked
from omni_jax.weights.layout import Index, Leaf
from omni_jax.weights.locate import locate
from omni_jax.weights.manifest import LeafRecord, Manifest, write_manifest
from omni_jax.weights.plan import WeightPlan, plan_weights
from omni_jax.weights.publish import publish
from omni_jax.weights.safetensors import SourceCheckpoint, open_checkpoint
from omni_jax.weights.schemes import REPEATED


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    parts: tuple[str, ...] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    verify: bool = False,
    progress: bool = False,
) -> Manifest:
    """Convert a Hugging Face checkpoint into `destination`, which appears complete or not at all.

    Args:
        source: its directory, a snapshot folder of the hub's cache, or a model id, which needs omni_jax[hub].
        destination: the directory to be written.
        parts: which parts to keep, default all.
        dtype: what to cast to, default as in the source.
        quantize: "int8" for routed experts in eight bits, default as in the source.
        overwrite: replace the destination if it is a converted checkpoint.
        allow_nonfinite: accept NaN and infinite weights.
        verify: read everything back and compare hashes before the destination appears; without it, only the first block
            of each array.
        progress: show a bar on stderr.

    CheckpointError names what is wrong; all that can be known is checked before any tensor is read.
    """
    from convert.verify import sample_checkpoint, verify_checkpoint

    stored = open_checkpoint(locate(source, "the source"))
    opened = as_asked(stored, dtype, quantize)
    planned = plan_weights(opened, parts, dtype)
    restated = opened.config != stored.config
    small = [path for path in _small_files(opened, planned) if not (restated and path.name in REPEATED)]
    if place_of(destination).final in opened.directory.resolve().parents:
        raise CheckpointError(f"{destination}: holds the checkpoint that is to be converted; choose another name")
    # Orbax's own files take a hundredth of the arrays.
    needed = planned.bytes + planned.bytes // 50 + sum(path.stat().st_size for path in small)
    with finishing(), publish(destination, overwrite, needed) as partial:
        copy_metadata(small, partial)
        if restated:
            write_whole(partial / "config.json", json.dumps(opened.config, indent=2) + "\n")
        leaves = _write_params(opened, planned, partial, allow_nonfinite, progress)
        manifest = write_manifest(partial, leaves, progress)
        if verify:
            verify_checkpoint(partial, progress)
        else:
            sample_checkpoint(partial, manifest)
        check()
    return manifest


def _small_files(source: SourceCheckpoint, planned: WeightPlan) -> list[Path]:
    """The model's small files, after a check that they are what loading needs."""
    Processor.from_dir(source.directory, planned.config)
    return metadata_files(source.directory)


def _write_params(
    source: SourceCheckpoint, planned: WeightPlan, directory: Path, allow_nonfinite: bool, progress: bool
) -> dict[str, LeafRecord]:
    """Stream all leaves into Orbax and return their records."""
    from convert.stream import StreamedLeaf, write_leaves

    records: dict[str, LeafRecord] = {}
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=planned.bytes, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
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
        for leaf, dtype in planned.leaves:
            chunks = chunk_shape(leaf.shape, leaf.axes, dtype.itemsize)
            leaves[leaf.path] = StreamedLeaf(
                leaf.shape, dtype, chunks, lambda leaf=leaf, dtype=dtype: blocks(leaf, dtype)
            )
        write_leaves(directory, leaves)
    return {leaf.path: records[leaf.path] for leaf, _ in planned.leaves}
