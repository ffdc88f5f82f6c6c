"""Which devices hold a model: from what a user asks for ("expert=4,data=2", "auto", nothing) to a mesh for each part.

    arrays of the checkpoint (shapes, types, axes) -+-> settle -> Placement: a mesh per part, and why
    mesh asked for, devices and their memory -------+

All is decided from headers, before any weight is read: a mesh must divide what it splits, and what each device then
holds, weights and a cache, must fit its memory where that is known (GPUs state it, CPUs do not).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.distributed import min_over_processes
from omni_jax.errors import CheckpointError, InputError
from omni_jax.models.param import Declaration
from omni_jax.ops.cache import AXES, capacity_for
from omni_jax.sharding import (
    bytes_on_a_device,
    check_mesh,
    divides,
    make_mesh,
    mesh_name,
    round_up_rows,
    split_over,
)
from omni_jax.sharding import shardings as shardings_on
from omni_jax.weights.mesh_text import parse_parts
from omni_jax.weights.parts import declared_arrays
from omni_jax.weights.trees import flatten

# What a cache is planned for: so many conversations of so many tokens. Whoever asks for more finds out at run time.
PLANNED_ROWS, PLANNED_TOKENS = 8, 4096
# The share left to intermediate results, of what a device says it holds. On GPU that is JAX's pool: three quarters of
# the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
WORKING_SHARE = 0.1
# A cache whose slots double is held so many times over meanwhile: new keys and values beside the old values.
GROWTH = 5 / 4
# Devices that an automatic mesh splits experts over at most, those of one host as usually built, and then the rest of
# the model.
AUTO_EXPERT = 8
AUTO_TENSOR = (1, 2, 4)

AUTO = "auto"
MeshLike = str | Mesh | Mapping[str, Mesh] | None


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the model as far as its place is concerned.

    declaration: the shapes and logical axes of its arrays. itemsizes: bytes of one number of each, by path. text: the
    causal stack that needs a cache; None for a part without one.
    """

    name: str
    declaration: Declaration
    itemsizes: Mapping[str, int]
    text: DecoderConfig | None

    @property
    def declared(self) -> tuple[dict, dict]:
        """Shapes and logical axes as nested dicts, as `sharding.divides` takes them."""
        return self.declaration.shapes, self.declaration.axes

    def bytes_on_a_device(self, sizes: Mapping[str, int]) -> int:
        """Bytes of weights and of the planned cache on one device of a mesh of these sizes."""
        rows = round_up_rows(PLANNED_ROWS, sizes)
        return self.weight_bytes(sizes) + self.most_cache_bytes(sizes, rows, PLANNED_TOKENS)

    def weight_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of weights on one device of a mesh of these sizes."""
        arrays = declared_arrays(self.declaration, f"{self.name}/")
        return sum(
            bytes_on_a_device(shape, self.itemsizes[path], axes, sizes) for path, (shape, axes) in arrays.items()
        )

    def cache_bytes(self, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
        """As the function of this name, 0 for a part without a cache; its numbers have the widest type of weights."""
        if self.text is None:
            return 0
        return cache_bytes(self.text, max(self.itemsizes.values()), sizes, rows, tokens)

    def most_cache_bytes(self, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
        """The same at its peak, as the function of this name."""
        if self.text is None:
            return 0
        return most_cache_bytes(self.text, max(self.itemsizes.values()), sizes, rows, tokens)


def describe_part(
    part: str, declaration: Declaration, config: OmniConfig, types: Mapping[str, str], dtype: str | None = None
) -> Part:
    """What placing a part needs to know; its arrays are in `dtype`, or in that of `types` by path."""
    paths = flatten(declaration.shapes, f"{part}/")
    itemsizes = {path: np.dtype(dtype or types[path]).itemsize for path in paths}
    text = {"thinker": config.thinker.text, "talker": config.talker and config.talker.text}.get(part)
    return Part(part, declaration, itemsizes, text)


def cache_bytes(text: DecoderConfig, itemsize: int, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
    """Bytes on one device of a cache for `rows` conversations of `tokens` tokens, in numbers of `itemsize` bytes."""
    slots = capacity_for(min(tokens, text.max_position_embeddings))
    shape = (text.num_layers, rows, text.num_kv_heads, slots, text.head_dim)
    over = (name for axis, size in zip(AXES, shape, strict=True) for name in split_over(axis, size, sizes))
    return 2 * prod(shape) * itemsize // prod(sizes.get(name, 1) for name in over)


def most_cache_bytes(text: DecoderConfig, itemsize: int, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
    """The same at most: while the cache grows to that size, with one more conversation behind its prompt.

    A single row is not split over the devices that share a batch: it lies whole on each.
    """
    one = cache_bytes(text, itemsize, sizes, 1, tokens)
    return int(GROWTH * cache_bytes(text, itemsize, sizes, rows, tokens)) + one


@dataclass(frozen=True)
class Placement:
    """meshes: by part, none for the first device alone. reason: a sentence on what was chosen and why, or empty."""

    meshes: dict[str, Mesh]
    reason: str = ""

    def shardings(self, declarations: Mapping[str, Declaration]) -> dict | None:
        """The shardings of all arrays of these parts as a tree; None for the first device alone."""
        tree = {part: shardings_on(declarations[part].axes, mesh) for part, mesh in self.meshes.items()}
        return tree or None


def resolve_placement(asked: MeshLike, parts: Sequence[Part], devices: Sequence[Any] | None = None) -> Placement:
    """The meshes that were asked for, checked; with "auto", the model over the fewest devices that hold it.

    Devices that are left over then hold it again, for more rows, if their memory is known or several processes need a
    part each. devices: those to take, by default all. Raises InputError for a mesh that does not divide the model or
    the devices, or leaves a process without any, and CheckpointError where weights and cache do not fit, naming the
    smallest mesh that would.
    """
    devices = jax.devices() if devices is None else devices
    if asked == AUTO:
        return _choose(parts, devices)
    meshes = _meshes(asked, [part.name for part in parts], devices)
    _check_processes(meshes, devices)
    for part in parts:
        if part.name in meshes:
            check_mesh({part.name: part.declared}, meshes[part.name])
    _check_memory(meshes, parts, devices)
    return Placement(meshes)


def memory_limit(device: Any) -> int | None:
    """Bytes that a device can hold, None where it does not say."""
    try:
        stats = device.memory_stats()
    except (AttributeError, jax.errors.JaxRuntimeError):
        return None
    return (stats or {}).get("bytes_limit")


def _meshes(asked: MeshLike, parts: Sequence[str], devices: Sequence[Any]) -> dict[str, Mesh]:
    """A mesh for each part as it was asked for, on devices in their order."""
    if asked is None:
        return {}
    if isinstance(asked, Mesh):
        return dict.fromkeys(parts, asked)
    if isinstance(asked, Mapping):
        lost = [part for part in parts if part not in asked]
        if lost:
            raise InputError(f"no mesh is given for the {lost[0]}")
        return {part: asked[part] for part in parts}
    sizes = parse_parts(asked, parts)
    counts = {part: prod(axes.values()) for part, axes in sizes.items()}
    needed = sum(counts.values())
    if needed > len(devices) or ("" in sizes and len(devices) % needed):
        wrong = "there are" if needed > len(devices) else "which does not divide the"
        raise InputError(f"mesh {asked!r} takes {needed} devices, {wrong} {len(devices)}; choose other sizes")
    made, at = {}, 0
    for part, axes in sizes.items():
        made[part] = make_mesh(devices[at : at + counts[part]], **axes)
        at += counts[part]
    shared = made.get("")
    return {part: shared or made.get(part) or made["talker"] for part in parts}


def _check_processes(meshes: Mapping[str, Mesh], devices: Sequence[Any]) -> None:
    """InputError unless every process has devices of the one mesh: one without any holds nothing and can run nothing.

    Without a mesh each process has a model of its own.
    """
    if not meshes or not _several(devices):
        return
    mesh, *others = set(meshes.values())
    if others:
        raise InputError("several processes share one mesh for all parts: leave out the parts' names")
    idle = {device.process_index for device in devices} - {device.process_index for device in mesh.devices.flat}
    if idle:
        more = {**mesh.shape, "data": mesh.shape.get("data", 1) * (len(devices) // mesh.size)}
        raise InputError(
            f"mesh {mesh_name(mesh)} takes {mesh.size} of {len(devices)} devices, which leaves process {min(idle)} "
            f"without any; let it take all, as {mesh_name(more)} does, or auto"
        )


def _several(devices: Sequence[Any]) -> bool:
    """Whether the devices are those of several processes."""
    return len({device.process_index for device in devices}) > 1


def _check_memory(meshes: Mapping[str, Mesh], parts: Sequence[Part], devices: Sequence[Any]) -> None:
    """CheckpointError unless each device that says how much it holds can hold its pieces."""
    held: dict[Any, int] = {}
    first = [device for device in devices if device.process_index == jax.process_index()][:1]
    for part in parts:
        mesh = meshes.get(part.name)
        sizes = {} if mesh is None else mesh.shape
        for device in first if mesh is None else mesh.devices.flat:
            held[device] = held.get(device, 0) + part.bytes_on_a_device(sizes)
    for device, count in held.items():
        limit = usable(device)
        if limit is not None and count > limit:
            raise CheckpointError(_does_not_fit(count, limit, parts))


def usable(device: Any) -> int | None:
    """Bytes that weights and caches may take of a device, None where it does not say."""
    limit = memory_limit(device)
    return None if limit is None else int(limit * (1 - WORKING_SHARE))


def _does_not_fit(count: int, limit: int, parts: Sequence[Part]) -> str:
    """What is too large, and the remedy."""
    most = next((part.text.num_experts for part in parts if part.text and part.text.num_experts), 1)
    wider = ({"expert": e, "tensor": t} for t in AUTO_TENSOR for e in range(1, most + 1))
    fitting = [sizes for sizes in wider if _fits(sizes, parts, limit)]
    remedy = "no mesh makes it fit; load fewer parts, or in bfloat16"
    if fitting:
        smallest = min(fitting, key=lambda sizes: sizes["expert"] * sizes["tensor"])
        remedy = f"the smallest mesh that fits is {mesh_name(smallest)}"
    return (
        f"each device would hold {count / 1e9:.2f} GB of weights and cache, of {limit / 1e9:.2f} GB that it has beside "
        f"working memory; {remedy}"
    )


def _fits(sizes: dict[str, int], parts: Sequence[Part], limit: int | None) -> bool:
    """Whether a mesh of these sizes divides the model and each device can hold its pieces."""
    if not all(divides(part.declared, sizes) for part in parts):
        return False
    return limit is None or sum(part.bytes_on_a_device(sizes) for part in parts) <= limit


def _choose(parts: Sequence[Part], devices: Sequence[Any]) -> Placement:
    """The first candidate that fits, and why: copies of a model whose experts lie over as few devices as hold it."""
    limit, several = min(filter(None, map(usable, devices)), default=None), _several(devices)
    if several:
        # All must choose alike, and a process knows its own devices only.
        limit = min_over_processes(limit or 0) or None
    # One process that knows nothing of memory takes one device; the others may not even be real ones.
    count = len(devices) if several or limit is not None else 1
    for over in _candidates(count):
        # Each copy has room for the planned rows: how many there are does not change which fits.
        copies = count // prod(over.values())
        if _fits(over, parts, limit) and not (several and copies * prod(over.values()) < count):
            sizes = {**over, "data": copies}
            mesh = make_mesh(devices[: prod(sizes.values())], **sizes)
            held = sum(part.bytes_on_a_device(over) for part in parts)
            return Placement(dict.fromkeys((part.name for part in parts), mesh), _reason(sizes, count, held, limit))
    assert limit is not None, "a model without a limit fits one device"
    raise CheckpointError(_does_not_fit(sum(part.bytes_on_a_device({}) for part in parts), limit, parts))


def _candidates(devices: int) -> Iterator[dict[str, int]]:
    """Sizes of meshes on at most so many devices in the order in which they are tried.

    Experts are split first, which moves the least, and heads and widths only where that is not enough.
    """
    for tensor in AUTO_TENSOR:
        for expert in range(1, min(AUTO_EXPERT, devices // tensor) + 1):
            yield {"expert": expert, "tensor": tensor}


def _reason(sizes: Mapping[str, int], devices: int, held: int, limit: int | None) -> str:
    """What an automatic mesh is, and why."""
    over, copies = sizes["expert"] * sizes["tensor"], sizes["data"]
    over_devices = "1 device" if over == 1 else f"{over} devices"
    split = "experts and heads" if sizes["tensor"] > 1 else "experts"
    more = f", {copies} times for more rows" if copies > 1 else ""
    idle = devices - over * copies
    idle_devices = f", {idle} left over" if idle else ""
    known = "devices do not report their memory" if limit is None else f"of {limit / 1e9:.2f} GB usable"
    return (
        f"{mesh_name(sizes)}: the model over {over_devices}, the fewest that hold it by {split}{more}{idle_devices}; "
        f"{held / 1e9:.2f} GB on each ({known})"
    )
