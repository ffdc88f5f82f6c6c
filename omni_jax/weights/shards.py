"""Which part of an array each device holds: shardings by path, and the shards of an array with their devices."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Sharding, SingleDeviceSharding

from omni_jax.errors import CheckpointError
from omni_jax.sharding import first_device
from omni_jax.weights.layout import Box
from omni_jax.weights.trees import flatten

# A tree of shardings, nested as the parameters are, or one for all arrays; None for the first device.
Shardings = Mapping[str, Any] | Sharding | None


def sharding_of(shardings: Shardings, path: str, shape: tuple[int, ...]) -> Sharding:
    """The sharding of one array; CheckpointError when none is given for it or its devices do not divide it."""
    if shardings is None:
        return SingleDeviceSharding(first_device())
    found = shardings if isinstance(shardings, Sharding) else flatten(dict(shardings)).get(path)
    if not isinstance(found, Sharding):
        raise CheckpointError(f"no sharding is given for the array {path!r}")
    try:
        found.shard_shape(shape)
    except ValueError as error:
        raise CheckpointError(f"{path} {list(shape)} does not divide over the mesh: {error}") from error
    return found


def shards_of(sharding: Sharding, shape: tuple[int, ...]) -> dict[Box, list[Any]]:
    """The shards of an array of `shape` that this process's devices hold, each with the devices that hold it."""
    shards: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        slices = index or (slice(None),) * len(shape)
        spans = tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True))
        shards.setdefault(spans, []).append(device)
    return shards
