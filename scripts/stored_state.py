"""The state of a small training loop in one file, written as a whole, from which the loop goes on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def save(file: Path, state: Any, step: int, spent: float) -> None:
    """Write a pytree of arrays, the number of steps and the seconds spent on them."""
    part = file.with_suffix(".partial")
    with part.open("wb") as stream:
        np.savez(stream, *map(np.asarray, jax.tree.leaves(state)), step=step, spent=spent)
    part.replace(file)


def restored(file: Path, state: Any) -> tuple[Any, int, float]:
    """What `save` wrote, with the structure of `state`; without a file that state, no step and no second."""
    if not file.exists():
        return state, 0, 0.0
    with np.load(file) as stored:
        leaves = [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(jax.tree.leaves(state)))]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), int(stored["step"]), float(stored["spent"])
