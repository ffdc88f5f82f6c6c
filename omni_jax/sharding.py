"""Where arrays are: the mesh, and one table from logical axes to mesh axes.

Modules name their axes by meaning ("expert", "heads"). Only `RULES` says over which mesh axes each of these is split,
so a new layout is an edit of this table. Every mesh is built here, with automatic axes: the compiler places what the
rules and `constrain` leave open.

A mesh is written "expert=4,data=2", or "thinker:expert=4;talker:expert=2" where each part has devices of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from omni_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axis, or several, of which the longest run from the first on that divides is taken. An axis that
# is not listed, or listed as None, is replicated. Devices that share the experts also share the rows of a batch:
# attention and cache need no expert, so every expert shard would otherwise compute and hold all of them.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "expert": "expert",
    "kv_heads": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "embed": "fsdp",
    "head_dim": None,
    "layers": None,
}

# What config.json calls the size of a logical axis.
CONFIG_NAMES = {
    "expert": "num_experts",
    "kv_heads": "num_key_value_heads",
    "heads": "num_attention_heads",
    "mlp": "intermediate size",
    "vocab": "vocab_size",
    "embed": "hidden_size",
}

# The logical axes of an array.
Axes = tuple[str | None, ...]
# An array of the device, or of the host.
Array = jax.Array | np.ndarray


def platform() -> str:
    """Where programs traced now will run ("cpu", "gpu"): the default device's platform, else the default backend's.

    InputError if the environment asks for devices that are not here.
    """
    device = getattr(jax.config, "jax_default_device", None)
    try:
        return getattr(device, "platform", device) or jax.default_backend()
    # JAX raises AssertionError where its plugin for CUDA is missing.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(" (set JAX_PLATFORMS")[0][:200] or "JAX has no plugin for it"
        platforms = getattr(jax.config, "jax_platforms", None) or ""
        raise InputError(
            f"JAX_PLATFORMS={platforms}: no such device can be used here ({reason}); unset it to take what there is, "
            "or install omni_jax[cuda] for NVIDIA GPUs"
        ) from error


def first_device() -> Any:
    """The device of what has no mesh: JAX's default device, else the first one of this process."""
    stated = getattr(jax.config, "jax_default_device", None)
    return stated if isinstance(stated, jax.Device) else jax.local_devices(backend=stated)[0]


def is_hopper() -> bool:
    """Whether programs traced now will run on a Hopper GPU; true too where the device does not state what it is."""
    return str(getattr(first_device(), "compute_capability", "9.0")).startswith("9.")


def make_mesh(devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A mesh over `devices` (by default the first ones), with a size for each axis, by default 1.

    InputError for an axis that does not exist, or another number of devices.
    """
    unknown = sorted(set(sizes) - set(MESH_AXES))
    if unknown:
        raise InputError(f"mesh axes {unknown} do not exist; choose from {list(MESH_AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = jax.devices()[: prod(shape)] if devices is None else devices
    if len(devices) != prod(shape):
        raise InputError(f"mesh {mesh_name(sizes)} needs {prod(shape)} devices, there are {len(devices)}")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def mesh_name(mesh: Mesh | Mapping[str, int]) -> str:
    """A mesh as users write it: "expert=4,data=2"; "data=1" for a single device."""
    sizes = _sizes(mesh)
    ordered = [axis for axis in ("expert", "tensor", "data", "fsdp") if sizes.get(axis, 1) > 1]
    return ",".join(f"{axis}={sizes[axis]}" for axis in ordered) or "data=1"


def _sizes(mesh: Mesh | Mapping[str, int]) -> Mapping[str, int]:
    return mesh.shape if isinstance(mesh, Mesh) else mesh


def spec(axes: Axes) -> PartitionSpec:
    """The partition of an array with these logical axes under `RULES`."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def shardings(axes: dict, mesh: Mesh) -> dict:
    """A tree of logical axes (tuples) to a tree of NamedShardings on `mesh`."""
    return jax.tree.map(lambda a: NamedSharding(mesh, spec(a)), axes, is_leaf=lambda a: isinstance(a, tuple))


def split_over(axis: str | None, size: int, mesh: Mesh | Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes over which a logical axis of `size` is split: the longest run of its rule that divides the size."""
    sizes, names = _sizes(mesh), _rule(axis)
    runs = [names[:n] for n in range(len(names), 0, -1)]
    return next((run for run in runs if size % prod(sizes.get(name, 1) for name in run) == 0), ())


def round_up_rows(rows: int, mesh: Mesh | Mapping[str, int] | None) -> int:
    """`rows`, rounded up to what the mesh divides: rows that it does not divide would all be on every device."""
    sizes = {} if mesh is None else _sizes(mesh)
    shards = prod(sizes.get(name, 1) for name in _rule("batch"))
    return -(-rows // shards) * shards


def _rule(axis: str | None) -> tuple[str, ...]:
    """The mesh axes over which a logical axis may be split."""
    names = RULES.get(axis) if axis else None
    return (names,) if isinstance(names, str) else names or ()


def sharding_for(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of an array of `shape` under `RULES`, replicated along axes that the mesh does not divide."""
    parts = (split_over(axis, size, mesh) for axis, size in zip(axes, shape, strict=True))
    return NamedSharding(mesh, PartitionSpec(*(part or None for part in parts)))


def constrain(x: jax.Array, axes: Axes, mesh: Mesh | None) -> jax.Array:
    """`x` [...], inside `jit`, with its logical axes split over `mesh` where it divides them; `x` without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding_for(axes, x.shape, mesh))


def constrain_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x` [B, ...], inside `jit`, with its rows split over `mesh`; a scalar is replicated."""
    return constrain(x, _by_rows(x), mesh)


def _by_rows(x: Any) -> Axes:
    """The axes of an array [B, ...]; none of a scalar."""
    return ("batch", *[None] * (x.ndim - 1)) if x.ndim else ()


def replicate(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x` [...], inside `jit`, whole on every device of `mesh`: for what every host reads."""
    return constrain(x, (None,) * x.ndim, mesh)


def replicate_for_hosts(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x` [...], inside `jit`, replicated if the mesh has several processes, so that each host can read all of it.

    A process can read from its own devices only. A single process has all devices, so nothing needs to move.
    """
    return replicate(x, mesh) if mesh is not None and mesh.is_multi_process else x


def per_shard(function: Callable[..., jax.Array], mesh: Mesh | None, *args: tuple[Any, Axes]) -> jax.Array:
    """function(*arrays) on every device's own shards of the arrays; the result is split as the first of them.

    args: each array [...] with its logical axes. For functions that need no communication, where the compiler would
    gather whole arrays.
    """
    arrays = [jnp.asarray(x) for x, _ in args]
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    specs = tuple(sharding_for(axes, x.shape, mesh).spec for x, (_, axes) in zip(arrays, args, strict=True))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def place(x: Any, axes: Axes, mesh: Mesh | None) -> Any:
    """An array [...] of the host or of other devices, split over `mesh` where it divides; `x` without a mesh."""
    if mesh is None:
        return x
    sharding = sharding_for(axes, x.shape, mesh)
    if not mesh.is_multi_process:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        bits = place(jax.random.key_data(x), (*axes, None), mesh)
        return jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(bits)
    # Every process has the whole array and gives its devices their shards.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """A tree of arrays [B, ...], with their rows split over `mesh`, numbers whole; the tree itself without a mesh."""
    return jax.tree.map(lambda x: place(x, _by_rows(x), mesh), tree)


def on_host(x: Any) -> np.ndarray:
    """An array [...] on the host, wherever its shards are; all processes that hold some must call this."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def check_mesh(declared: dict[str, tuple[dict, dict]], mesh: Mesh | Mapping[str, int]) -> None:
    """Raise InputError, which names the number and the mesh axis, unless the mesh divides every array that it splits.

    declared: for each part the shapes and the logical axes of its arrays, as nested dicts.
    """
    sizes = _sizes(mesh)
    for part, (shapes, axes) in declared.items():
        for path, axis, size, over in _undivided(shapes, axes, sizes):
            raise InputError(
                f"mesh {mesh_name(sizes)}: {over}={sizes[over]} does not divide the {part}'s "
                f"{CONFIG_NAMES.get(axis, axis)} {size} ({path}); choose a divisor, or give the {part} a mesh of its "
                "own, as in thinker:expert=4;talker:expert=2"
            )


def divides(declared: tuple[dict, dict], sizes: Mapping[str, int]) -> bool:
    """Whether a mesh of these sizes divides every array that it splits; declared: shapes and axes as nested dicts."""
    return next(_undivided(*declared, sizes), None) is None


def _undivided(shapes: dict, axes: dict, sizes: Mapping[str, int]) -> Iterator[tuple[str, str, int, str]]:
    """Path, logical axis, its size and the mesh axis wherever the latter does not divide."""
    for path, shape, names in _leaves(shapes, axes):
        for axis, size in zip(names, shape, strict=True):
            over = RULES.get(axis) if axis else None
            if axis and isinstance(over, str) and size % sizes.get(over, 1):
                yield path, axis, size, over


def _leaves(shapes: dict, axes: dict, prefix: str = "") -> Iterator[tuple[str, tuple[int, ...], Axes]]:
    """Path, shape and axes of every array."""
    for name, shape in shapes.items():
        if isinstance(shape, dict):
            yield from _leaves(shape, axes[name], f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", tuple(shape.shape), axes[name]


def bytes_on_a_device(shape: tuple[int, ...], itemsize: int, axes: Axes, mesh: Mesh | Mapping[str, int]) -> int:
    """Bytes of one device's shard of an array of `shape`, whose split axes the mesh divides."""
    sizes = _sizes(mesh)
    over = (RULES.get(axis) if axis else None for axis in axes)
    return prod(shape) * itemsize // prod(sizes.get(name, 1) for name in over if isinstance(name, str))
