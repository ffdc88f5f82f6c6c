"""The state of a small training loop in one file, written as a whole, from which the loop goes on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.errors import InputError


def save(file: Path, state: Any, step: int, spent: float) -> None:
    """Write a pytree of arrays, the number of steps and the seconds spent on them."""
    part = file.with_suffix(".partial")
    with part.open("wb") as stream:
        np.savez(stream, *map(np.asarray, jax.tree.leaves(state)), step=step, spent=spent)
    part.replace(file)


def restored(file: Path, state: Any) -> tuple[Any, int, float]:
    """What `save` wrote, with the structure of `state`; without a file that state, no step and no second.

    InputError if the file holds other numbers, shapes or types of arrays than `state`.
    """
    if not file.exists():
        return state, 0, 0.0
    with np.load(file) as stored:
        wanted = [(leaf.shape, leaf.dtype) for leaf in map(np.asarray, jax.tree.leaves(state))]
        leaves = [stored[f"arr_{i}"] for i in range(len(stored.files) - 2)]
        if (held := [(leaf.shape, leaf.dtype) for leaf in leaves]) != wanted:
            raise InputError(f"{file} {_difference(held, wanted)}; delete it, or go on with the settings that made it")
        read = jax.tree.unflatten(jax.tree.structure(state), list(map(jnp.asarray, leaves)))
        return read, int(stored["step"]), float(stored["spent"])


def _difference(held: list[tuple], wanted: list[tuple]) -> str:
    if len(held) != len(wanted):
        return f"holds {len(held)} arrays, not {len(wanted)}"
    i = next(i for i, (a, b) in enumerate(zip(held, wanted, strict=True)) if a != b)
    return "holds {1} of shape {0} where {3} of shape {2} is wanted".format(*held[i], *wanted[i])
