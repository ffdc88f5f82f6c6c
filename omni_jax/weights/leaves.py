"""Arrays out of safetensors files onto devices, for models and drafters: nothing is written, nothing is held twice.

    an array at a time -> this process's shards, one group of experts at a time -> one array over all devices

Devices that hold the same layers and experts are served together, and each of their tensors is read once: only the rows
that they hold, where those are contiguous. The host's copy of a shard is freed as soon as its devices have it, so the
host never holds more than one group of shards besides what is on its own devices.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from omni_jax.weights.blocks import THREADS, ahead, read_box
from omni_jax.weights.layout import Box, Leaf
from omni_jax.weights.safetensors import SourceCheckpoint
from omni_jax.weights.shards import Shardings, sharding_of, shards_of


def read_leaves(
    source: SourceCheckpoint,
    leaves: Iterable[tuple[Leaf, np.dtype]],
    shardings: Shardings = None,
    allow_nonfinite: bool = False,
) -> dict[str, jax.Array]:
    """The arrays of some rows of a key map by path, each of its leaf's shape, in the dtype beside it.

    Args:
        source: the checkpoint that they are read from.
        leaves: the rows, each with the dtype to cast to.
        shardings: as in `checkpoint.restore`. Each process reads only what its devices hold.
        allow_nonfinite: whether NaN and infinite values are accepted; CheckpointError otherwise.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return {
            leaf.path: _Reader(source, leaf, dtype, pool, allow_nonfinite).read(
                sharding_of(shardings, leaf.path, leaf.shape)
            )
            for leaf, dtype in leaves
        }


@dataclass(frozen=True)
class _Reader:
    """Reads one leaf."""

    source: SourceCheckpoint
    leaf: Leaf
    dtype: np.dtype
    pool: ThreadPoolExecutor
    allow_nonfinite: bool

    def read(self, sharding: Sharding) -> jax.Array:
        """The leaf as an array of its shape over the devices of `sharding`, of which this process's are filled."""
        groups: dict[Box, dict[Box, list[Any]]] = {}
        depth = len(self.leaf.stack)
        for spans, devices in shards_of(sharding, self.leaf.shape).items():
            groups.setdefault(spans[:depth], {})[spans[depth:]] = devices
        placed = [x for ranges, boxes in groups.items() for x in self._group(ranges, boxes)]
        return jax.make_array_from_single_device_arrays(self.leaf.shape, sharding, placed)

    def _group(self, ranges: Box, boxes: dict[Box, list[Any]]) -> Iterator[jax.Array]:
        """The shards of devices that hold the same layers and experts, each on its device.

        ranges: which layers and experts, along the stacked axes. boxes: which part of each of their blocks is held, and
        by which devices.
        """
        lengths = tuple(stop - start for start, stop in ranges)
        shards = {box: np.empty((*lengths, *(b - a for a, b in box)), self.dtype) for box in boxes}
        spans = zip(*boxes, strict=True)
        around = self.leaf.readable(tuple((min(a for a, _ in span), max(b for _, b in span)) for span in spans))
        only = shards[around] if list(shards) == [around] else None

        def read(index: tuple[int, ...]) -> None:
            """Read a block, and write it to the shards, whose fresh memory is then touched by several threads."""
            at = tuple(i - start for i, (start, _) in zip(index, ranges, strict=True))
            block = np.empty([b - a for a, b in around], self.dtype) if only is None else only[(*at, ...)]
            read_box(self.source, self.leaf, index, around, block, self.allow_nonfinite)
            for box, shard in shards.items() if only is None else ():
                shard[at] = block[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(box, around, strict=True))]

        block_bytes = 2 * int(np.prod([b - a for a, b in around], dtype=np.int64)) * self.dtype.itemsize
        for _ in ahead(self.pool, read, product(*(range(*r) for r in ranges)), block_bytes):
            pass
        for box in list(shards):
            shard = shards.pop(box)
            for device in boxes[box]:
                yield jax.block_until_ready(jax.device_put(shard, device))
