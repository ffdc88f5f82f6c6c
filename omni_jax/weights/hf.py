"""Hugging Face checkpoint -> arrays on devices, without writing anything.

    plan -> a leaf at a time -> the pieces of this process's devices, experts by experts -> one array over all devices

Devices that hold the same layers and experts are served together, and each tensor of theirs is read once: only the rows
that they hold, where they hold contiguous ones. What a piece was read into is given up as soon as its device has it, so
the host never holds more than one group of pieces beside what lies on its own devices.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.sharding import shardings as shardings_of
from omni_jax.weights.blocks import THREADS, Box, ahead, read_box
from omni_jax.weights.checkpoint import Shardings, nest, sharding_of
from omni_jax.weights.layout import Leaf
from omni_jax.weights.placement import MeshLike, Part, resolve_placement
from omni_jax.weights.plan import Plan, plan
from omni_jax.weights.safetensors import SourceCheckpoint, open_checkpoint

# Stacked axes of a leaf as ranges of layers and experts, and the rest as start and stop per axis.
Ranges = tuple[tuple[int, int], ...]


def load_hf(
    directory: str | Path,
    parts: tuple[str, ...] | None = None,
    dtype: str | None = None,
    shardings: Shardings = None,
    allow_nonfinite: bool = False,
    mesh: MeshLike = None,
) -> tuple[dict, OmniConfig]:
    """Load a Hugging Face checkpoint directory: parameters as a nested dict of jax arrays, and the configuration.

    parts, shardings and dtype as in `omni_jax.weights.checkpoint.restore`; mesh, in place of shardings, as in `omni_jax.load`,
    with the same errors. Each process reads what its devices hold.
    """
    source = open_checkpoint(directory)
    made = plan(source, parts, dtype)
    if mesh is not None:
        if shardings is not None:
            raise InputError("load_hf takes a mesh or shardings, not both")
        shardings = _on_mesh(made, mesh)
    arrays = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for leaf, kind in made.leaves:
            reader = _Reader(source, leaf, kind, pool, allow_nonfinite)
            arrays[leaf.path] = reader.read(sharding_of(shardings, leaf.path, leaf.shape))
    return nest(arrays), made.config


def _on_mesh(made: Plan, asked: MeshLike) -> dict:
    """The shardings of a plan's leaves on the mesh of each part, checked before anything is read."""
    names = tuple(dict.fromkeys(leaf.path.split("/")[0] for leaf, _ in made.leaves))
    meshes = resolve_placement(asked, [_part(made, name) for name in names]).meshes
    return {part: shardings_of(nest(_axes(made, part)), mesh) for part, mesh in meshes.items()}


def _part(made: Plan, name: str) -> Part:
    """What placing a part needs to know."""
    leaves = [(leaf, kind) for leaf, kind in made.leaves if leaf.path.startswith(f"{name}/")]
    shapes = {leaf.path.removeprefix(f"{name}/"): SimpleNamespace(shape=leaf.shape) for leaf, _ in leaves}
    arrays = {leaf.path: (leaf.shape, kind.itemsize, leaf.axes) for leaf, kind in leaves}
    config = made.config
    text = {"thinker": config.thinker.text, "talker": config.talker and config.talker.text}.get(name)
    return Part(name, arrays, (nest(shapes), nest(_axes(made, name))), text)


def _axes(made: Plan, part: str) -> dict[str, Any]:
    """Logical axes by path within a part."""
    return {
        leaf.path.removeprefix(f"{part}/"): leaf.axes for leaf, _ in made.leaves if leaf.path.startswith(f"{part}/")
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
        """The leaf as an array over the devices of `sharding`, of which this process's are filled."""
        groups: dict[Ranges, dict[Box, list[Any]]] = {}
        depth = len(self.leaf.stack)
        for device, index in sharding.addressable_devices_indices_map(self.leaf.shape).items():
            whole = (slice(None),) * len(self.leaf.shape)
            spans = tuple(s.indices(n)[:2] for s, n in zip(index or whole, self.leaf.shape, strict=True))
            groups.setdefault(spans[:depth], {}).setdefault(spans[depth:], []).append(device)
        placed = [x for ranges, boxes in groups.items() for x in self._group(ranges, boxes)]
        return jax.make_array_from_single_device_arrays(self.leaf.shape, sharding, placed)

    def _group(self, ranges: Ranges, boxes: dict[Box, list[Any]]) -> Iterator[jax.Array]:
        """The pieces of devices that hold the same layers and experts, each on its device."""
        lengths = tuple(stop - start for start, stop in ranges)
        pieces = {box: np.empty((*lengths, *(b - a for a, b in box)), self.dtype) for box in boxes}
        spans = zip(*boxes, strict=True)
        around = self.leaf.readable(tuple((min(a for a, _ in span), max(b for _, b in span)) for span in spans))

        def read(index: tuple[int, ...]) -> np.ndarray:
            return read_box(self.source, self.leaf, index, around, self.dtype, self.allow_nonfinite)

        block_bytes = 2 * int(np.prod([b - a for a, b in around], dtype=np.int64)) * self.dtype.itemsize
        for index, block in ahead(self.pool, read, product(*(range(*r) for r in ranges)), block_bytes):
            at = tuple(i - start for i, (start, _) in zip(index, ranges, strict=True))
            for box, piece in pieces.items():
                piece[at] = block[tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(box, around, strict=True))]
        for box in list(pieces):
            piece = pieces.pop(box)
            for device in boxes[box]:
                yield jax.block_until_ready(jax.device_put(piece, device))
