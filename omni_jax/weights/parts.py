"""The parts of a model by name, and what their modules declare.

    OmniConfig -> declare_parts -> by part: the shape and logical axes of every array

Shapes and axes are stated in the modules alone; key maps, placement and checkpoints take them from here.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.files import reason_of
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import Axes, Declaration, declare
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.weights.trees import flatten

# The parts of a model and the modules that they are, in the order in which they are listed and stored.
PARTS = {"thinker": Thinker, "talker": Talker, "code2wav": Code2Wav}
# The types in which loaded weights can be held. A checkpoint may also store float16.
DTYPES = ("float32", "bfloat16")

Shape = tuple[int, ...]


def parts_of(config: OmniConfig) -> tuple[str, ...]:
    """The names of the parts that a model of this configuration has."""
    return tuple(part for part in PARTS if getattr(config, part) is not None)


def choose_parts(wanted: Sequence[str] | None, held: Sequence[str], directory: Path) -> tuple[str, ...]:
    """The parts that are wanted, by default all that a checkpoint holds; InputError for one that it does not hold."""
    held = [part for part in PARTS if part in held]
    if not set(wanted or ()) <= set(held):
        raise InputError(
            f"parts {tuple(wanted or ())}: {directory} holds {held}; choose from these, or take a checkpoint of the "
            "whole model"
        )
    return tuple(part for part in held if wanted is None or part in wanted)


def declare_parts(config: OmniConfig, parts: Sequence[str] | None = None) -> dict[str, Declaration]:
    """The declarations of some parts, by default of all that `config` has; CheckpointError for impossible sizes."""
    return {part: _declare(part, getattr(config, part)) for part in (parts_of(config) if parts is None else parts)}


def declared_arrays(declaration: Declaration, prefix: str = "") -> dict[str, tuple[Shape, Axes]]:
    """Shape and logical axes of every array of a declaration, by its path after `prefix`."""
    axes = flatten(declaration.axes, prefix)
    return {path: (tuple(array.shape), axes[path]) for path, array in flatten(declaration.shapes, prefix).items()}


@lru_cache(maxsize=16)
def _declare(part: str, config: Any) -> Declaration:
    """One part's declaration; tracing its module takes half a second, and several steps of a conversion need it."""
    try:
        return declare(PARTS[part], config)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"config.json: no {part} can have these sizes ({reason_of(error)}); take the config.json of these weights"
        ) from error
