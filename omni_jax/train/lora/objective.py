"""Low-rank adapters as an objective: the factors are trained, and the model that they belong to is only read.

Omni, settings -> the Thinker declared with factors -> Objective: params = factors, frozen = the model as it is
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.models.low_rank import LowRankConfig
from omni_jax.models.param import Declaration, declare
from omni_jax.models.thinker import Thinker
from omni_jax.omni import Omni
from omni_jax.sharding import place, sharding_for
from omni_jax.train.lora.settings import LowRankSettings
from omni_jax.train.objective import Loss, Objective, cast
from omni_jax.weights.adapter_config import AdapterConfig
from omni_jax.weights.adapter_files import factor_rows, read_factors, write_adapter
from omni_jax.weights.adapters import open_adapter
from omni_jax.weights.layout import Leaf
from omni_jax.weights.trees import flatten, nest

PART = "thinker"


def lora_objective(
    settings: LowRankSettings, omni: Omni, loss: Callable[..., Loss], dtype: Any, seed: int = 0, base: str = ""
) -> Objective:
    """Train factors beside the Thinker of a loaded model, which is not changed.

    Args:
        settings: what is adapted.
        omni: the model; its mesh is that of the factors.
        loss: a pure function of trained arrays, of the others, of a batch, and of the `declaration` of them all.
        dtype: the type to compute in, which the model's own arrays are held in.
        seed: of factors that begin as random numbers.
        base: the name of the model, for the adapter's file.

    InputError for settings that do not go with the model, errors of `open_adapter` for an adapter to train on from.
    """
    wanted, own = settings.for_model(omni.config.thinker.text), omni.declarations[PART]
    declaration = declare(Thinker, omni.config.thinker, wanted, mesh=own.mesh)
    rows = factor_rows(omni.config, PART, declaration)
    axes = {leaf.path.removeprefix(f"{PART}/"): leaf.axes for leaf in rows}
    if settings.adapter is None:
        factors = new_factors(omni, wanted, declaration, list(axes), seed)
    else:
        read = read_factors(open_adapter(settings.adapter, omni.config), rows, settings.scale)
        arrays = {path.removeprefix(f"{PART}/"): x for path, x in read.items()}
        factors = {path: place(jnp.asarray(x), axes[path], own.mesh) for path, x in arrays.items()}
    return Objective(
        nest(factors),
        cast(omni._part(PART)[1], dtype),
        nest(axes),
        partial(loss, declaration=declaration),
        partial(save_factors, rows, settings.adapter_config(base)),
    )


def new_factors(
    omni: Omni, config: LowRankConfig, declaration: Declaration, paths: list[str], seed: int
) -> dict[str, jax.Array]:
    """Factors by path on the model's mesh, float32: A uniform within 1 / sqrt(in), B zero, so that nothing changes."""
    shapes, axes, mesh = flatten(declaration.shapes), flatten(declaration.axes), declaration.mesh
    shardings = None if mesh is None else {path: sharding_for(axes[path], shapes[path].shape, mesh) for path in paths}

    @partial(jax.jit, out_shardings=shardings)
    def make(key: jax.Array) -> dict[str, jax.Array]:
        # The model's own arrays are declared beside them; as nobody takes them, they are not made.
        state = nnx.state(Thinker(nnx.Rngs(params=key), omni.config.thinker, config))
        arrays = flatten(nnx.to_pure_dict(state))
        return {path: arrays[path] for path in paths}

    return make(jax.random.key(seed))


def save_factors(rows: list[Leaf], config: AdapterConfig, params: dict[str, Any], directory: Path) -> None:
    """Write trained factors as an adapter in PEFT's form; CheckpointError if that cannot be."""
    write_adapter(directory, flatten({PART: params}), rows, config)
