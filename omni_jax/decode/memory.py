"""The memory that a request needs, planned before it is spent: caches at their limits, and the weights.

A cache is one array for all rows, so one long reply makes room in all of them: it is planned with every row at the
limit. What is available is the device's own memory where it states that, else what is free on the host, which its
devices share. Weights may be arrays, or jax.ShapeDtypeStructs while they are not read.
"""

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh

from omni_jax.config import DecoderConfig
from omni_jax.errors import MemoryLimitError
from omni_jax.inputs.memory import available_bytes
from omni_jax.sharding import first_device
from omni_jax.weights.budget import MOST_FRACTION, WORKING_SHARE, fraction, most_cache_bytes, usable

GB = 1e9
MOST_ROWS = 1 << 40  # more than any machine holds


@dataclass(frozen=True)
class CacheNeed:
    """What a request fills: a cache on the devices of a part ("thinker", "talker"), for rows of `tokens` tokens.

    tokens: at most. text: the decoder that the cache is for. owner: whose it is, if not the part's own.
    """

    part: str
    text: DecoderConfig
    rows: int
    tokens: int
    owner: str = ""

    def bytes(self, params: Mapping[str, dict], mesh: Mesh | None) -> int:
        """The most bytes on each device, in the type of the part's weights."""
        itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(params[self.part]))
        sizes = {} if mesh is None else mesh.shape
        return most_cache_bytes(self.text, itemsize, sizes, self.rows, self.tokens)


@dataclass(frozen=True, eq=False)
class Memory:
    """The bytes that weights leave free on each device, by mesh, read once: what is cached later is not free any more.

    params, meshes: of the parts that are loaded, by name.
    """

    params: Mapping[str, dict]
    meshes: Mapping[str, Mesh | None]
    free: Mapping[Mesh | None, int]

    @classmethod
    def read(cls, params: Mapping[str, dict], meshes: Mapping[str, Mesh | None]) -> "Memory":
        """What is free now."""
        by_mesh = {mesh: [params[part] for part in params if meshes[part] == mesh] for mesh in meshes.values()}
        free = {mesh: max(available(mesh) - weight_bytes(parts, mesh), 0) for mesh, parts in by_mesh.items()}
        return cls(params, meshes, free)

    def beside(self, part: str, kept: int, remedy: str) -> "Memory":
        """What is free beside `kept` bytes on each device of a part; MemoryLimitError if there are not so many.

        How devices share what will be kept is not known, so each is taken to hold all of it.
        """
        mesh = self.meshes[part]
        if kept > self.free[mesh]:
            raise MemoryLimitError(
                f"{kept / GB:,.2f} GB are to be kept of earlier requests, and there are {self.free[mesh] / GB:,.2f} GB "
                f"beside the weights; {remedy}"
            )
        return replace(self, free={**self.free, mesh: self.free[mesh] - kept})

    def check(self, caches: Sequence[CacheNeed], remedy: str) -> None:
        """Raise MemoryLimitError, with the plan, the free memory and the remedy, for caches that do not fit."""
        for mesh in dict.fromkeys(self.meshes[cache.part] for cache in caches):
            planned = [cache for cache in caches if self.meshes[cache.part] == mesh]
            need = sum(cache.bytes(self.params, mesh) for cache in planned)
            if need > self.free[mesh]:
                plan = " and ".join(
                    f"{c.rows:,} row{'s' * (c.rows > 1)} of up to {c.tokens:,} tokens ({c.owner or c.part})"
                    for c in planned
                )
                more = "spread the model over more devices with mesh"
                name, share = fraction()
                if usable(_devices(mesh)[0]) is not None and share < MOST_FRACTION:
                    more += f", or give JAX more of the device with {name}={MOST_FRACTION:g}"
                raise MemoryLimitError(
                    f"this request would take {need / GB:,.2f} GB of a device for caches of {plan}; there are "
                    f"{self.free[mesh] / GB:,.2f} GB beside the weights; {remedy}: {self._would_fit(planned)} would "
                    f"fit; or {more}"
                )

    def fitting_rows(self, caches: Sequence[CacheNeed]) -> int:
        """The number of these rows that devices can hold, 0 if none."""

        def fits(rows: int) -> bool:
            return all(
                sum(replace(c, rows=rows).bytes(self.params, mesh) for c in caches if self.meshes[c.part] == mesh)
                <= self.free[mesh]
                for mesh in {self.meshes[c.part] for c in caches}
            )

        return bisect_left(range(min(caches[0].rows, MOST_ROWS)), True, key=lambda less: not fits(less + 1))

    def _would_fit(self, caches: Sequence[CacheNeed]) -> str:
        """What would fit instead: fewer rows of this length, and the same number of shorter rows."""
        rows = self.fitting_rows(caches)
        lengths = (1 << n for n in range(max(c.tokens for c in caches).bit_length(), 7, -1))
        for length in lengths:
            shorter = [replace(c, tokens=min(c.tokens, length)) for c in caches]
            if self.fitting_rows(shorter) == caches[0].rows:
                tokens = f"rows of at most {length:,} tokens with their prompts"
                return f"{rows:,} of these rows, or {tokens}," if rows else tokens
        return f"{rows:,} of these rows" if rows else "fewer and shorter rows"


def weight_bytes(params: Any, mesh: Mesh | None) -> int:
    """Bytes of what is `available` on each device that weights take; on a host, only those not yet read."""
    leaves = jax.tree.leaves(params)
    if usable(_devices(mesh)[0]) is None:
        leaves = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]
    shapes = (x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in leaves)
    return sum(prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


def available(mesh: Mesh | None) -> int:
    """Bytes for weights and caches on a device of a mesh, or on the first device: its own, or a host's free ones.

    A host that does not state what is free counts as empty.
    """
    devices = _devices(mesh)
    stated = usable(devices[0])
    if stated is not None:
        return stated
    free = available_bytes()
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(free * (1 - WORKING_SHARE)) // len(devices)


def _devices(mesh: Mesh | None) -> list[Any]:
    return [first_device()] if mesh is None else list(mesh.local_devices)
