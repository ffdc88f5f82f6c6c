"""Arrays out of an Orbax checkpoint onto devices, one shard at a time.

Orbax restores an array by reading all shards of this host's devices and then handing them over: the host holds them
twice, and several arrays at once. Here a shard is read, put on the devices that want it and freed before the next
one is read. Only `checkpoint.restore` uses this; Orbax itself finds the arrays and their formats.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from omni_jax.weights.shards import shards_of


def shard_registry() -> Any:
    """Orbax's registry of handlers with one for jax arrays that restores them shard by shard."""
    import tensorstore as ts
    from orbax.checkpoint import type_handlers

    class Shards(type_handlers.ArrayHandler):
        """Restores each array as its ArrayRestoreArgs say: sharding, dtype, and the shape that is expected."""

        async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
            arrays: dict[int, jax.Array] = {}
            wanted = list(zip(infos, args or (), strict=True))
            # The largest first: the host needs room for one shard, and the devices' own memory is still empty then.
            for i in sorted(range(len(wanted)), key=lambda i: -prod(wanted[i][1].global_shape)):
                info, arg = wanted[i]
                spec = ts.Spec(type_handlers.get_json_tspec_read(info, use_ocdbt=True))
                store = await ts.open(spec, open=True, context=info.ts_context or ts.Context())
                if tuple(store.shape) != tuple(arg.global_shape):
                    raise ValueError(f"{info.name} has shape {list(store.shape)}, not {list(arg.global_shape)}")
                arrays[i] = await read_shards(store, arg.sharding, arg.dtype)
            return [arrays[i] for i in range(len(wanted))]

    return type_handlers.create_type_handler_registry((jax.Array, Shards()))


async def read_shards(store: Any, sharding: Sharding, dtype: Any) -> jax.Array:
    """A TensorStore array as a jax array of the same shape and of `dtype` over `sharding`; each shard is read once."""
    shape, placed = tuple(store.shape), []
    for spans, devices in shards_of(sharding, shape).items():
        value = np.asarray(await store[tuple(slice(*span) for span in spans)].read(), dtype)
        placed += [jax.block_until_ready(jax.device_put(value, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)
