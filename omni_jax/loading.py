"""From what a user names to an `Omni`: everything is checked and placed before any weight is read.

where -> StoredModel (weights.model) -> parts, meshes (weights.placement) -> read, each device its own shards -> Omni
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.compilation_cache import use_compilation_cache
from omni_jax.decode.arguments import explained
from omni_jax.errors import InputError
from omni_jax.inputs.values import listed, shown
from omni_jax.omni import Omni
from omni_jax.quantization import check_quantize
from omni_jax.weights.adapters import open_adapter
from omni_jax.weights.keymap import table
from omni_jax.weights.merge import merge
from omni_jax.weights.model import open_model
from omni_jax.weights.parts import DTYPES, PARTS
from omni_jax.weights.placement import MeshLike, resolve_placement
from omni_jax.weights.shards import Shardings, sharding_of
from omni_jax.weights.stored import StoredModel
from omni_jax.weights.trees import flatten, nest


@explained
def load(
    where: str | Path,
    *,
    mesh: MeshLike = None,
    dtype: str | None = None,
    parts: Sequence[str] | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
) -> Omni:
    """Load a model onto the first device, or onto a mesh of devices.

    Args:
        where: a converted checkpoint (`python -m convert SRC DST`), a Hugging Face directory, a snapshot folder of the
            hub's cache, or a model id such as "Qwen/Qwen3-Omni-30B-A3B-Instruct", which needs omni_jax[hub]. Without a
            network a model id is looked up in the cache. "nano" is the small trained model that the package holds.
            Weights that others have quantised (GPTQ, compressed-tensors, FP8) are read as float.
        mesh: "expert=4,data=2" for all parts; "thinker:expert=4;talker:expert=2" for each its own devices (the vocoder
            shares the Talker's unless named; in one process only); "auto" for the model over the fewest devices that
            hold it, and copies on the others, which `Omni.mesh_reason` explains; or meshes of `sharding.make_mesh`.
            Several processes with a mesh share it, each with all its devices; without one, each has its own model.
        dtype: "float32" or "bfloat16"; by default as `default_dtype` says.
        parts: which of "thinker", "talker" and "code2wav" to load, by default all that the checkpoint has; ("thinker",)
            is enough for text.
        adapter: directory of a LoRA adapter for this model, as PEFT or this project saves it; it is merged into the
            weights, in float32.
        quantize: "int8" for the routed experts in eight bits, which halve the memory of a model in bfloat16; of a
            Hugging Face checkpoint, or one that was converted so.

    Before any array is read, raises CheckpointError for a checkpoint that is incomplete or damaged, whose arrays are
    not those of its config.json or do not fit the devices, and for an adapter of another model; InputError for a mesh
    that does not divide the model; ConfigError for an adapter that is more than LoRA's factors.
    """
    omni = load_lazily(where, mesh=mesh, dtype=dtype, parts=parts, adapter=adapter, quantize=quantize)
    omni._read_weights()
    return omni


def load_lazily(
    where: str | Path,
    *,
    mesh: MeshLike = None,
    dtype: str | None = None,
    parts: Sequence[str] | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    before_reading: Callable[[Omni], None] = lambda omni: None,
) -> Omni:
    """A model that reads its weights once, when a request that passed its checks is about to run.

    So wrong requests are refused within a second. Arguments and errors as in `load`; before_reading is called with the
    model just before its weights are read.
    """
    _check_arguments(mesh, dtype, parts)
    check_quantize(quantize)
    use_compilation_cache()
    chosen, wanted = None if parts is None else tuple(parts), dtype or default_dtype()
    model = open_model(where, chosen, wanted, quantize)
    if wanted is None and (wanted := default_dtype(model.types.values())):
        model = open_model(where, chosen, wanted, quantize)
    if adapter is not None and model.config.thinker.text.int8_experts:
        raise InputError(
            "an adapter cannot be merged into weights of eight bits; merge it first, quantise what is saved"
        )
    added = None if adapter is None else open_adapter(adapter, model.config)
    processor = model.processor()
    placement = resolve_placement(mesh, model.parts())
    shardings = placement.shardings(model.declarations)

    def read() -> dict:
        before_reading(omni)
        params = model.read(shardings)
        return params if added is None else merge(params, added, table(model.config))

    params, meshes = _awaited(model, shardings), placement.meshes or None
    omni = Omni(params, model.config, processor, meshes, read, placement.reason)
    return omni


def default_dtype(stored: Iterable[str] = ()) -> str | None:
    """The type in which weights that are stored in these types are held by default; None for as they are stored.

    On CPU it is float32, because half-precision experts would be widened again at every step. Elsewhere it is bfloat16
    for weights in a type that is not held, which is float16.
    """
    if sharding.platform() == "cpu":
        return "float32"
    return None if {*stored} <= {*DTYPES, "int8"} else "bfloat16"


def _awaited(model: StoredModel, shardings: Shardings) -> dict:
    """The parameters before they are read: a nested dict of shapes, dtypes and shardings."""
    shapes = flatten({part: declaration.shapes for part, declaration in model.declarations.items()})
    return nest(
        {
            path: jax.ShapeDtypeStruct(
                array.shape, np.dtype(model.types[path]), sharding=sharding_of(shardings, path, array.shape)
            )
            for path, array in shapes.items()
        }
    )


def _check_arguments(mesh: Any, dtype: Any, parts: Any) -> None:
    """Raise InputError, with what to give instead, for arguments of `load` of another type or an unknown name."""
    if not isinstance(mesh, str | Mesh | Mapping | None):
        raise InputError(f"mesh is {shown(mesh)}; give text such as 'expert=4,data=2', 'auto', or meshes")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise InputError(f"dtype is {shown(dtype)}; choose from {list(DTYPES)}")
    if parts is None:
        return
    remedy = f"give some of {tuple(PARTS)}, such as ('thinker',)"
    names = listed("parts", parts, remedy)
    for part in names:
        if not isinstance(part, str):
            raise InputError(f"parts holds {shown(part)}; {remedy}")
    if not names or not set(names) <= set(PARTS):
        raise InputError(f"parts {tuple(names)}: choose from these: {list(PARTS)}")
