"""The memory that a request needs, planned before it is spent: caches at their limits, beside the weights.

A cache is one array for all rows, so one long reply makes room for all of them: it is planned for every row at the
limit. What is there is the device's own memory where it states it, else the host's, which its devices share.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import jax
from jax.sharding import Mesh

from omni_jax.config import DecoderConfig
from omni_jax.errors import InputError
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
        """At most, on each device; in the type of the part's weights, of two bytes if none are there yet."""
        itemsize = max((leaf.dtype.itemsize for leaf in jax.tree.leaves(params[self.part])), default=2)
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
        have = max(available(mesh) - sum(map(weight_bytes, (params[part] for part in here))), 0)
        if need > have:
            plan = " and ".join(f"{c.rows:,} rows of up to {c.tokens:,} tokens ({c.part})" for c in planned)
            most = planned[0].rows * have // need
            rows = f"at most about {most:,} rows at once" if most else "fewer rows and tokens"
            raise InputError(
                f"this request would take {need / GB:,.2f} GB of a device for caches of {plan}; there are "
                f"{have / GB:,.2f} GB beside the weights; {remedy}: {rows} would fit"
            )


def weight_bytes(params: dict) -> int:
    """Bytes of arrays on each device that holds them."""
    shapes = (
        (x.sharding.shard_shape(x.shape) if isinstance(x, jax.Array) else x.shape, x) for x in jax.tree.leaves(params)
    )
    return sum(prod(shape) * x.dtype.itemsize for shape, x in shapes)


def available(mesh: Mesh | None) -> int:
    """Bytes that weights and caches may take of each device of a mesh, or of the first device."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    stated = usable(devices[0])
    if stated is not None:
        return stated
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * (1 - WORKING_SHARE)) // len(devices)
