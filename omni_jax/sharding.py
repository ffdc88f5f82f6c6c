"""Where arrays live: the mesh, and one table from a parameter's logical axes to mesh axes.

Modules name their axes by meaning ("expert", "heads"); only `RULES` knows on which mesh axis a meaning is split, so a
new layout is an edit of this table. Every mesh is built here, with automatic axes: the compiler places what the rules
leave open.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "expert", "tensor")

# Logical axis -> mesh axis. An axis that is not listed, or listed as None, is replicated.
RULES: dict[str, str | None] = {
    "batch": "data",
    "expert": "expert",
    "kv_heads": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed": None,
    "head_dim": None,
    "layers": None,
}


def platform() -> str:
    """Where programs traced now will run ("cpu", "gpu"): the default device's platform, else the default backend's."""
    device = getattr(jax.config, "jax_default_device", None)
    return getattr(device, "platform", device) or jax.default_backend()


def make_mesh(devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (default: the first one) with `sizes` per axis, 1 where not given."""
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"mesh axes {unknown} do not exist; choose from {list(MESH_AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = jax.devices()[:1] if devices is None else devices
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes under `RULES`."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def shardings(axes: dict, mesh: Mesh) -> dict:
    """A tree of logical axes (tuples) as a tree of NamedShardings on `mesh`."""
    return jax.tree.map(lambda a: NamedSharding(mesh, spec(a)), axes, is_leaf=lambda a: isinstance(a, tuple))
