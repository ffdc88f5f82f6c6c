"""A trained part of a model, written with everything else that its source holds."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from omni_jax.train.state import leaf_shardings
from omni_jax.weights import checkpoint
from omni_jax.weights.model import open_model
from omni_jax.weights.trees import flatten, nest


def save_part(part: str, source: Path, mesh: Mesh | None, params: dict[str, Any], directory: Path) -> None:
    """Write the model of `source`, with these parameters of a part in place of its own, as a converted checkpoint.

    params: a nested dict of some of the part's arrays, which are cast to the types that they have in the source.
    CheckpointError if the directory cannot be written.
    """
    model = open_model(source)
    shardings = {name: leaf_shardings(one.shapes, one.axes, mesh) for name, one in model.declarations.items()}
    arrays = flatten(model.read(shardings))
    for path, x in flatten({part: params}).items():
        arrays[path] = x.astype(arrays[path].dtype)
    checkpoint.save(directory, nest(arrays), model.directory)
