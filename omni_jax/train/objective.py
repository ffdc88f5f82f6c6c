"""What a recipe gives to the loop: parameters to train, their loss, and how to write what users load."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """Sums over what counts in a batch; a gradient step divides them by the weights of all its batches.

    total and weight: float32 []. metrics: further sums by name, float32 [], shown divided by the weight.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Objective:
    """What is trained.

    params: a pytree of float32 arrays that are trained. frozen: a pytree of arrays that the loss only reads. axes: the
    logical axes of each of the params, in a tree of the same form. loss: a pure function of params, frozen and a batch.
    save: writes what users load, made from trained params, into a new directory.
    """

    params: Any
    frozen: Any
    axes: Any
    loss: Callable[[Any, Any, Any], Loss]
    save: Callable[[Any, Path], None]


def cast(params: Any, dtype: Any) -> Any:
    """The floating-point arrays of a pytree in `dtype`, others as they are."""
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)
