"""A converted checkpoint to an `Omni`: what is asked for is checked and placed before any weight is read.

config.json, manifest -> parts, meshes (placement) -> restore, each device its own pieces -> Omni
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.compilation_cache import use_compilation_cache
from omni_jax.config import OmniConfig
from omni_jax.decode.arguments import explained
from omni_jax.errors import CheckpointError, InputError
from omni_jax.files import reason_of, user_path
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.values import listed, shown
from omni_jax.models.param import Declaration, declare
from omni_jax.omni import PARTS, Omni
from omni_jax.weights import checkpoint
from omni_jax.weights.manifest import read_manifest
from omni_jax.weights.placement import MeshLike, Part, resolve_placement

DTYPES = ("float32", "bfloat16")


@explained
def load(
    path: str | Path, *, mesh: MeshLike = None, dtype: str | None = None, parts: Sequence[str] | None = None
) -> Omni:
    """Load a converted checkpoint directory onto the first device, or onto a mesh of devices.

    mesh: "expert=4,data=2" for all parts; "thinker:expert=4;talker:expert=2" for each its own devices (the vocoder with
    the Talker unless named; in one process only); "auto" for a model over as few devices as hold it, and copies on the
    others, which `Omni.mesh_reason` explains; or meshes of `sharding.make_mesh`. Several processes with a mesh share
    it, each with all its devices; without one, each has a model of its own. dtype: "float32" or "bfloat16"; by default
    as `default_dtype` says. parts: which of "thinker", "talker" and "code2wav" to load, by default all that the
    checkpoint has; ("thinker",) is enough for text.
    Before any array is read, raises CheckpointError for a directory that is not a complete converted checkpoint, whose
    arrays are not those of its config.json or do not fit the devices, and InputError for a mesh that does not divide.
    """
    omni = load_lazily(path, mesh=mesh, dtype=dtype, parts=parts)
    omni._read_weights()
    return omni


def load_lazily(
    path: str | Path,
    *,
    mesh: MeshLike = None,
    dtype: str | None = None,
    parts: Sequence[str] | None = None,
    before_reading: Callable[[Omni], None] = lambda omni: None,
) -> Omni:
    """A model that reads its weights, once, when a request that was found good is about to run.

    So wrong requests are refused within a second. Arguments and errors as in `load`.
    """
    path = user_path(path, "the model")
    _check_arguments(mesh, dtype, parts)
    usual = default_dtype()
    use_compilation_cache()
    config, manifest = checkpoint.read_config(path), read_manifest(path)
    parts = _chosen(path, manifest.parts, parts)
    processor = Processor.from_dir(path, config)
    declarations = {part: _declared(path, part, config) for part in parts}
    checkpoint.check_shapes(path, {part: declaration.shapes for part, declaration in declarations.items()})
    dtype = dtype or usual
    types = {name: leaf.dtype for name, leaf in manifest.leaves.items()}
    placement = resolve_placement(
        mesh, [describe_part(part, declarations[part], config, types, dtype) for part in parts]
    )
    placed = {part: sharding.shardings(declarations[part].axes, on) for part, on in placement.meshes.items()}

    def read() -> dict:
        before_reading(omni)
        return checkpoint.restore(path, parts, placed or None, dtype)

    awaited = {part: declarations[part].shapes for part in parts}
    params = checkpoint.nest(
        {
            name: jax.ShapeDtypeStruct(
                leaf.shape, dtype or types[name], sharding=checkpoint.sharding_of(placed or None, name, leaf.shape)
            )
            for name, leaf in checkpoint.flatten(awaited).items()
        }
    )
    omni = Omni(params, config, processor, placement.meshes or None, read, placement.reason)
    return omni


def _check_arguments(mesh: Any, dtype: Any, parts: Any) -> None:
    """Raise InputError, with what to give instead, for arguments of `load` of another type or an unknown dtype."""
    if not isinstance(mesh, str | Mesh | Mapping | None):
        raise InputError(f"mesh is {shown(mesh)}; give text such as 'expert=4,data=2', 'auto', or meshes")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise InputError(f"dtype is {shown(dtype)}; choose from {list(DTYPES)}")
    if parts is not None:
        remedy = f"give some of {tuple(PARTS)}, such as ('thinker',)"
        for part in listed("parts", parts, remedy):
            if not isinstance(part, str):
                raise InputError(f"parts holds {shown(part)}; {remedy}")


def _chosen(path: Path, present: Sequence[str], parts: Sequence[str] | None) -> tuple[str, ...]:
    """The parts to load, by default all that were converted; InputError for one that was not."""
    held = [part for part in PARTS if part in present]
    parts = tuple(held if parts is None else parts)
    if not parts or not set(parts) <= set(held):
        raise InputError(f"parts {parts}: {path} holds {held}; choose from these, or convert the model with more parts")
    return parts


def _declared(path: Path, part: str, config: OmniConfig) -> Declaration:
    """The declaration of a part; CheckpointError for sizes of which there is no model."""
    try:
        return declare(PARTS[part], getattr(config, part))
    except (ArithmeticError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'config.json'}: there is no {part} of these sizes ({reason_of(error)}); restore the config.json "
            "that it was converted with"
        ) from error


def describe_part(
    part: str, declaration: Declaration, config: OmniConfig, types: Mapping[str, str], dtype: str | None
) -> Part:
    """What placing a part needs to know; `types`: the stored type by path, which `dtype` replaces if given."""
    shapes, axes = (checkpoint.flatten(tree, f"{part}/") for tree in (declaration.shapes, declaration.axes))
    arrays = {path: (tuple(s.shape), np.dtype(dtype or types[path]).itemsize, axes[path]) for path, s in shapes.items()}
    text = {"thinker": config.thinker.text, "talker": config.talker and config.talker.text}.get(part)
    return Part(part, arrays, (declaration.shapes, declaration.axes), text)


def default_dtype() -> str | None:
    """The type that weights are held in unless told: None, as stored, on accelerators, and float32 on CPU.

    There, half-precision experts would be widened again at every step.
    """
    return "float32" if sharding.platform() == "cpu" else None
