"""The memory that a request needs, planned before it is spent: caches at their limits, beside the weights.

A cache is one array for all rows, so one long reply makes room for all of them: it is planned for every row at the
limit. What is there is the device's own memory where it states it, else what the host has free, which its devices
share. Weights may be arrays, or jax.ShapeDtypeStructs while they are not read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.sharding import Mesh

from omni_jax.config import DecoderConfig
from omni_jax.errors import InputError
from omni_jax.inputs.memory import available_bytes
from omni_jax.placement import WORKING_SHARE, most_cache_bytes, usable

GB = 1e9


@dataclass(frozen=True)
class Cache:
    """What a request fills: the cache of a part ("thinker", "talker"), for rows of at most `tokens` tokens."""

    part: str
    text: DecoderConfig
    rows: int
    tokens: int

    def bytes(self, params: Mapping[str, dict], mesh: Mesh | None) -> int:
        """At most, on each device; in the type of the part's weights."""
        itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(params[self.part]))
        sizes = {} if mesh is None else mesh.shape
        return most_cache_bytes(self.text, itemsize, sizes, self.rows, self.tokens)


def check_memory(
    caches: Sequence[Cache], params: Mapping[str, dict], meshes: Mapping[str, Mesh | None], remedy: str
) -> None:
    """Raise InputError, with the plan, what there is and the remedy, for caches that devices cannot hold."""
    for mesh in dict.fromkeys(meshes[cache.part] for cache in caches):
        here = [part for part in params if meshes[part] == mesh]
        planned = [cache for cache in caches if cache.part in here]
        need = sum(cache.bytes(params, mesh) for cache in planned)
        have = max(available(mesh) - weight_bytes([params[part] for part in here], mesh), 0)
        if need > have:
            plan = " and ".join(f"{c.rows:,} rows of up to {c.tokens:,} tokens ({c.part})" for c in planned)
            most = planned[0].rows * have // need
            rows = f"at most about {most:,} rows at once" if most else "fewer rows and tokens"
            raise InputError(
                f"this request would take {need / GB:,.2f} GB of a device for caches of {plan}; there are "
                f"{have / GB:,.2f} GB beside the weights; {remedy}: {rows} would fit"
            )


def weight_bytes(params: Any, mesh: Mesh | None) -> int:
    """Bytes that weights take of what is `available` on each device; of a host, those not yet read."""
    leaves = jax.tree.leaves(params)
    if usable(_devices(mesh)[0]) is None:
        leaves = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]
    shapes = (x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in leaves)
    return sum(prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, leaves, strict=True))


def available(mesh: Mesh | None) -> int:
    """Bytes that a device of a mesh, or the first device, has for weights and caches: all of its own, or a host's free.

    A host that does not state what is free is taken to be empty.
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
    return jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
