"""Hugging Face checkpoint -> arrays on devices, without writing anything."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.blocks import THREADS, ahead, read_block
from convert.layout import Index, Leaf
from convert.plan import plan
from convert.source import SourceCheckpoint, open_checkpoint
from omni_jax.checkpoint import Shardings, nest, sharding_of
from omni_jax.config import OmniConfig


def load_hf(
    directory: str | Path,
    parts: tuple[str, ...] | None = None,
    dtype: str | None = None,
    shardings: Shardings = None,
    allow_nonfinite: bool = False,
) -> tuple[dict, OmniConfig]:
    """Load a Hugging Face checkpoint directory: parameters as a nested dict of jax arrays, and the configuration.

    parts, shardings and dtype as in `omni_jax.checkpoint.restore`. Each process reads the layers and experts that its
    devices hold; one array at a time is on the host.
    """
    source = open_checkpoint(directory)
    made = plan(source, parts, dtype)
    arrays = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for leaf, kind in made.leaves:
            reader = _Reader(source, leaf, kind, pool, allow_nonfinite)
            sharding = sharding_of(shardings, leaf.path, leaf.shape)
            arrays[leaf.path] = jax.make_array_from_callback(leaf.shape, sharding, reader)
    return nest(arrays), made.config


class _Reader:
    """Serves the pieces of one leaf; devices that hold the same layers and experts share one reading of them."""

    def __init__(
        self, source: SourceCheckpoint, leaf: Leaf, dtype: np.dtype, pool: ThreadPoolExecutor, allow_nonfinite: bool
    ):
        self.source, self.leaf, self.dtype, self.pool = source, leaf, dtype, pool
        self.allow_nonfinite = allow_nonfinite
        self.read: dict[Any, np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or (slice(None),) * len(self.leaf.shape)
        depth = len(self.leaf.stack)
        ranges = tuple(range(*s.indices(n)) for s, n in zip(index[:depth], self.leaf.shape[:depth], strict=True))
        if ranges not in self.read:
            self.read[ranges] = self._gather(ranges)
        return self.read[ranges][(*[slice(None)] * depth, *index[depth:])]

    def _gather(self, ranges: tuple[range, ...]) -> np.ndarray:
        def read(index: Index) -> np.ndarray:
            return read_block(self.source, self.leaf, index, self.dtype, self.allow_nonfinite)[0]

        if not ranges:
            return read(())
        out = np.empty((*map(len, ranges), *self.leaf.block), self.dtype)
        for index, block in ahead(self.pool, read, product(*ranges), 2 * out[(0,) * len(ranges)].nbytes):
            out[tuple(i - r.start for i, r in zip(index, ranges, strict=True))] = block
        return out
