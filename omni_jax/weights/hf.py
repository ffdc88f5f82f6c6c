"""A Hugging Face checkpoint directory as a model that can be loaded, and `load_hf`, which gives its bare parameters.

directory -> headers -> `as_asked` -> plan: every tensor has its place -> StoredModel -> arrays on devices; nothing is
written
"""

from functools import partial
from pathlib import Path

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.weights.int8 import quantised
from omni_jax.weights.leaves import read_leaves
from omni_jax.weights.locate import locate
from omni_jax.weights.parts import declare_parts
from omni_jax.weights.placement import MeshLike, resolve_placement
from omni_jax.weights.plan import WeightPlan, plan_weights
from omni_jax.weights.safetensors import SourceCheckpoint, open_checkpoint
from omni_jax.weights.shards import Shardings
from omni_jax.weights.stored import StoredModel
from omni_jax.weights.trees import nest
from omni_jax.weights.widened import widened


def open_hf(
    directory: Path,
    parts: tuple[str, ...] | None = None,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    quantize: str | None = None,
) -> StoredModel:
    """The model of a Hugging Face directory, once every tensor of `parts` (default: all) was seen to have its place.

    quantize: "int8" for routed experts in eight bits.
    """
    source = as_asked(open_checkpoint(directory), dtype, quantize)
    planned = plan_weights(source, parts, dtype)
    names = tuple(dict.fromkeys(leaf.path.split("/")[0] for leaf, _ in planned.leaves))
    types = {leaf.path: dtype.name for leaf, dtype in planned.leaves}
    read = partial(_read, source, planned, allow_nonfinite)
    kind = "Hugging Face checkpoint"
    return StoredModel(directory, kind, planned.config, declare_parts(planned.config, names), types, read)


def as_asked(source: SourceCheckpoint, dtype: str | None, quantize: str | None) -> SourceCheckpoint:
    """A checkpoint as it will be read: in float if others have quantised it, then as `quantize` says.

    Errors as in `widened` and `quantised`.
    """
    return quantised(widened(source, dtype), quantize)


def load_hf(
    directory: str | Path,
    parts: tuple[str, ...] | None = None,
    dtype: str | None = None,
    shardings: Shardings = None,
    allow_nonfinite: bool = False,
    mesh: MeshLike = None,
    quantize: str | None = None,
) -> tuple[dict, OmniConfig]:
    """The parameters of a Hugging Face checkpoint as a nested dict of jax arrays, and its configuration.

    `omni_jax.load` takes the same sources and gives the whole model, ready to use.

    Args:
        directory: the checkpoint's directory, a snapshot of the hub's cache, or a model id.
        parts: which parts to read, default all.
        dtype: what to cast to on the way, default as stored.
        shardings: a tree of shardings or one for all, default the first device.
        allow_nonfinite: whether NaN and infinite weights are accepted.
        mesh: in place of shardings, as in `omni_jax.load`, with the same errors.
        quantize: "int8" for routed experts in eight bits.
    """
    if mesh is not None and shardings is not None:
        raise InputError("load_hf takes a mesh or shardings, not both")
    model = open_hf(locate(directory, "the source"), parts, dtype, allow_nonfinite, quantize)
    if mesh is not None:
        shardings = resolve_placement(mesh, model.parts()).shardings(model.declarations)
    return model.read(shardings), model.config


def _read(source: SourceCheckpoint, planned: WeightPlan, allow_nonfinite: bool, shardings: Shardings) -> dict:
    """The planned arrays as a nested dict."""
    return nest(read_leaves(source, planned.leaves, shardings, allow_nonfinite))
