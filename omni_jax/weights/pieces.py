"""Arrays out of an Orbax checkpoint onto devices, a piece at a time.

Orbax restores an array by reading all pieces of this host's devices and then handing them over: the host holds them
twice, and several arrays at once. Here a piece is read, handed to the devices that want it and given up before the next
one is read. Only `checkpoint.restore` uses this; Orbax itself finds the arrays and their formats.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def piece_registry() -> Any:
    """Orbax's registry of handlers with one for jax arrays that restores them by pieces."""
    import tensorstore as ts
    from orbax.checkpoint import type_handlers

    class Pieces(type_handlers.ArrayHandler):
        """Restores each array as its ArrayRestoreArgs say: sharding, dtype, and the shape that is expected."""

        async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[jax.Array]:
            arrays: dict[int, jax.Array] = {}
            asked = list(zip(infos, args or (), strict=True))
            # The largest first: what it takes beside its devices' pieces is taken while these are few.
            for i in sorted(range(len(asked)), key=lambda i: -prod(asked[i][1].global_shape)):
                info, wanted = asked[i]
                spec = ts.Spec(type_handlers.get_json_tspec_read(info, use_ocdbt=True))
                store = await ts.open(spec, open=True, context=info.ts_context or ts.Context())
                if tuple(store.shape) != tuple(wanted.global_shape):
                    raise ValueError(f"{info.name} has shape {list(store.shape)}, not {list(wanted.global_shape)}")
                arrays[i] = await read_pieces(store, wanted.sharding, wanted.dtype)
            return [arrays[i] for i in range(len(asked))]

    return type_handlers.create_type_handler_registry((jax.Array, Pieces()))


async def read_pieces(store: Any, sharding: Sharding, dtype: Any) -> jax.Array:
    """A TensorStore array as a jax array of `dtype` over the devices of `sharding`; pieces are read once each."""
    shape = tuple(store.shape)
    pieces: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        whole = (slice(None),) * len(shape)
        spans = tuple(s.indices(n)[:2] for s, n in zip(index or whole, shape, strict=True))
        pieces.setdefault(spans, []).append(device)
    placed = []
    for spans, devices in pieces.items():
        value = np.asarray(await store[tuple(slice(*span) for span in spans)].read(), dtype)
        placed += [jax.block_until_ready(jax.device_put(value, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)
