"""Which devices hold a model: from what a user gives ("expert=4,data=2", "auto", nothing) to a mesh for each part.

    arrays of the checkpoint (shapes, types, axes) -+-> resolve_placement -> Placement: a mesh per part, and why
    mesh that is wanted, devices and their memory --+

All is decided from headers, before any weight is read: a mesh must divide what it splits, and what each device then
holds, weights and the cache of one short conversation (`budget`), must fit its memory where that is known. A mesh that
is chosen leaves room for several long ones, if any does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from omni_jax.distributed import min_over_processes
from omni_jax.errors import CheckpointError, InputError
from omni_jax.models.param import Declaration
from omni_jax.sharding import MESH_AXES, check_mesh, divides, first_device, make_mesh, mesh_name
from omni_jax.sharding import shardings as shardings_on
from omni_jax.weights.budget import (
    LEAST,
    MOST_FRACTION,
    MOST_ROWS,
    PLANNED,
    Conversations,
    Part,
    enlargement,
    fraction,
    room_for,
    usable,
)
from omni_jax.weights.mesh_text import own_or_shared, parse_parts
from omni_jax.weights.parts import PARTS

AUTO = "auto"
# An automatic mesh splits experts over at most the 8 devices that one host usually has, and where that does not
# suffice also the rest of the model over 2 or 4.
AUTO_EXPERT = 8
AUTO_TENSOR = (1, 2, 4)

NOTHING_FITS = "no mesh makes it fit; load fewer parts, or take devices with more memory"

MeshLike = str | Mesh | Mapping[str, Mesh] | None


@dataclass(frozen=True)
class Placement:
    """meshes: by part, none for the first device alone. reason: a sentence on what was chosen and why, or empty."""

    meshes: dict[str, Mesh]
    reason: str = ""

    def shardings(self, declarations: Mapping[str, Declaration]) -> dict | None:
        """The shardings of all arrays of these parts as a tree; None for the first device alone."""
        tree = {part: shardings_on(declarations[part].axes, mesh) for part, mesh in self.meshes.items()}
        return tree or None


def resolve_placement(wanted: MeshLike, parts: Sequence[Part], devices: Sequence[Any] | None = None) -> Placement:
    """The meshes that a user wants, checked; with "auto", the model over the fewest devices that have room for it.

    With "auto", devices that are left over hold copies, for more rows, if their memory is known or several processes
    need a share each.

    Args:
        wanted: as in `omni_jax.load`.
        parts: the parts to place.
        devices: those to use, by default all.

    Raises InputError for a mesh that does not divide the model or the devices, or leaves a process without any, and
    CheckpointError where weights and the least cache do not fit, naming what would make them fit.
    """
    devices = jax.devices() if devices is None else devices
    if wanted == AUTO:
        return _choose(parts, devices)
    meshes = _meshes(wanted, [part.name for part in parts], devices)
    _check_processes(meshes, devices)
    for part in parts:
        if part.name in meshes:
            check_mesh({part.name: part.declared}, meshes[part.name])
    _check_memory(meshes, parts)
    return Placement(meshes)


def _meshes(wanted: MeshLike, parts: Sequence[str], devices: Sequence[Any]) -> dict[str, Mesh]:
    """The mesh that is wanted for each part; meshes given as text take devices in their order."""
    if wanted is None:
        return {}
    if isinstance(wanted, Mesh):
        wanted = dict.fromkeys(parts, wanted)
    if isinstance(wanted, Mapping):
        _check_meshes(wanted, parts)
        return {part: wanted[part] for part in parts}
    sizes = parse_parts(wanted, parts)
    counts = {part: prod(axes.values()) for part, axes in sizes.items()}
    needed = sum(counts.values())
    if needed > len(devices) or ("" in sizes and len(devices) % needed):
        wrong = "there are" if needed > len(devices) else "which does not divide the"
        raise InputError(f"mesh {wanted!r} takes {needed} devices, {wrong} {len(devices)}; choose other sizes")
    meshes, at = {}, 0
    for part, axes in sizes.items():
        meshes[part] = make_mesh(devices[at : at + counts[part]], **axes)
        at += counts[part]
    return {part: own_or_shared(part, meshes) for part in parts}


def _check_meshes(meshes: Mapping[str, Any], parts: Sequence[str]) -> None:
    """InputError unless there is a mesh for each part, as `sharding.make_mesh` makes them."""
    for part, mesh in meshes.items():
        if part not in PARTS:
            raise InputError(f"a mesh is given for {part!r}, and no part is called so; choose from {list(PARTS)}")
        if not isinstance(mesh, Mesh) or {*mesh.axis_names} != {*MESH_AXES} or {*mesh.axis_types} != {AxisType.Auto}:
            raise InputError(f"the mesh of the {part} is {mesh!r}; give one of omni_jax.sharding.make_mesh")
    missing = [part for part in parts if part not in meshes]
    if missing:
        raise InputError(f"no mesh is given for the {missing[0]}")


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


def _check_memory(meshes: Mapping[str, Mesh], parts: Sequence[Part]) -> None:
    """CheckpointError unless each device that reports its memory can hold its share."""

    def over(parts: Sequence[Part], factor: float) -> Iterator[tuple[Any, int, int]]:
        """The devices with too little memory, with what they would hold and what they have, times a factor."""
        for device, count in _held(meshes, parts).items():
            limit = usable(device)
            if limit is not None and count > limit * factor:
                yield device, count, limit

    if found := next(over(parts, 1), None):
        device, count, limit = found
        remedies = _remedies(parts, limit, enlargement(device), lambda *asked: next(over(*asked), None) is None)
        raise _too_large(count, limit, remedies)


def _held(meshes: Mapping[str, Mesh], parts: Sequence[Part]) -> dict[Any, int]:
    """The least bytes that each device holds of some parts."""
    held: dict[Any, int] = {}
    for part in parts:
        mesh = meshes.get(part.name)
        sizes = {} if mesh is None else mesh.shape
        for device in [first_device()] if mesh is None else mesh.devices.flat:
            held[device] = held.get(device, 0) + part.bytes_on_a_device(sizes, LEAST)
    return held


def _too_large(count: int, limit: int, remedies: Iterator[str]) -> CheckpointError:
    """The error for devices that would hold too much, with what would make it fit."""
    return CheckpointError(
        f"each device would hold {count / 1e9:.2f} GB of weights and the cache of {LEAST}, of {limit / 1e9:.2f} GB "
        f"that it has beside working memory; {', or '.join(remedies) or NOTHING_FITS}"
    )


def _remedies(
    parts: Sequence[Part], limit: int, factor: float, fits: Callable[[Sequence[Part], float], bool]
) -> Iterator[str]:
    """What would make parts fit that do not.

    factor: by how much the memory of devices can grow. fits: whether some parts would fit the devices that are asked
    for, with their memory times a factor.
    """
    if fits([part.in_bfloat16() for part in parts], 1):
        yield "dtype='bfloat16' (--dtype bfloat16) makes it fit"
    eight, larger = [part.in_eight_bits() for part in parts], f"{fraction()[0]}={MOST_FRACTION}"
    quantize = "quantize='int8' (--quantize int8) makes it fit"
    alone = fits(eight, 1), fits(parts, factor)
    if alone[0]:
        yield quantize
    if alone[1]:
        yield f"{larger} in the environment makes it fit"
    if not any(alone) and fits(eight, factor):
        yield f"{quantize} together with {larger} in the environment"
    most = next((part.text.num_experts for part in parts if part.text and part.text.num_experts), 1)
    wider = ({"expert": e, "tensor": t} for t in AUTO_TENSOR for e in range(1, most + 1))
    fitting = [sizes for sizes in wider if _fits(sizes, parts, limit, LEAST)]
    if fitting:
        smallest = min(fitting, key=lambda sizes: sizes["expert"] * sizes["tensor"])
        yield f"the smallest mesh that fits is {mesh_name(smallest)}"


def _fits(sizes: dict[str, int], parts: Sequence[Part], limit: float | None, room: Conversations) -> bool:
    """Whether a mesh of these sizes divides the model and each device can hold its share, with room for a cache."""
    if not all(divides(part.declared, sizes) for part in parts):
        return False
    return limit is None or sum(part.bytes_on_a_device(sizes, room) for part in parts) <= limit


def _choose(parts: Sequence[Part], devices: Sequence[Any]) -> Placement:
    """The first candidate that fits, and why: copies of the model, each over the fewest devices that hold it."""
    limit, several = min(filter(None, map(usable, devices)), default=None), _several(devices)
    if several:
        # All must choose alike, and a process knows its own devices only.
        limit = min_over_processes(limit or 0) or None
    # One process that knows nothing of memory takes one device; the others may not even be real ones.
    count = len(devices) if several or limit is not None else 1

    def fewest(parts: Sequence[Part], limit: float | None, room: Conversations) -> dict[str, int] | None:
        for over in _candidates(count):
            # Each copy has this room: how many there are does not change which fits.
            if _fits(over, parts, limit, room) and not (several and count % prod(over.values())):
                return over
        return None

    for room in (PLANNED, LEAST):
        if over := fewest(parts, limit, room):
            sizes = {**over, "data": count // prod(over.values())}
            mesh = make_mesh(devices[: prod(sizes.values())], **sizes)
            return Placement(dict.fromkeys((part.name for part in parts), mesh), _reason(sizes, count, parts, limit))
    assert limit is not None, "a model without a limit fits one device"
    available, held = limit, sum(part.bytes_on_a_device({}, LEAST) for part in parts)

    def fits(parts: Sequence[Part], factor: float) -> bool:
        return fewest(parts, available * factor, LEAST) is not None

    raise _too_large(held, limit, _remedies(parts, limit, enlargement(devices[0]), fits))


def _candidates(devices: int) -> Iterator[dict[str, int]]:
    """Sizes of meshes on at most this number of devices, in the order in which they are tried.

    Experts are split first, which moves the least, and heads and widths only where that is not enough.
    """
    for tensor in AUTO_TENSOR:
        for expert in range(1, min(AUTO_EXPERT, devices // tensor) + 1):
            yield {"expert": expert, "tensor": tensor}


def _reason(sizes: Mapping[str, int], devices: int, parts: Sequence[Part], limit: int | None) -> str:
    """What an automatic mesh is, and why."""
    over, copies = sizes["expert"] * sizes["tensor"], sizes["data"]
    over_devices = "1 device" if over == 1 else f"{over} devices"
    split = "experts and heads" if sizes["tensor"] > 1 else "experts"
    more = f", {copies} times for more rows" if copies > 1 else ""
    idle = devices - over * copies
    idle_devices = f", {idle} left over" if idle else ""
    weights = sum(part.weight_bytes(sizes) for part in parts)
    known = "devices do not report their memory" if limit is None else f"of {limit / 1e9:.2f} GB usable"
    room = None if limit is None else room_for(parts, sizes, limit)
    room_text = "" if room is None or room.rows == MOST_ROWS else f", room for {room}"
    return (
        f"{mesh_name(sizes)}: the model over {over_devices}, the fewest that hold it by {split}{more}{idle_devices}; "
        f"{weights / 1e9:.2f} GB of weights on each ({known}){room_text}"
    )
