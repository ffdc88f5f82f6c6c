"""A small training loop whose state is in one file, written as a whole, from which it goes on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import write_whole

SAVE_SECONDS, LOG_STEPS = 60, 20


def take_steps(
    file: Path,
    state: Any,
    numbers: range,
    spent: float,
    seconds: float,
    advance: Callable[[Any, int], tuple[Any, Any]],
    log: Callable[[int, float, Any], None],
) -> tuple[Any, int]:
    """Take the steps of `numbers`, or for `seconds`: the state, saved to `file`, and the number of steps taken.

    advance: the state after a step, and what there is to log of it, from a state and the step's number. log: told of
    every LOG_STEPS-th step and the last one: the number, seconds since the first start, `spent` before this one, and
    what there is to log.
    """
    started = saved = time.monotonic()
    for number in numbers:
        state, shown = advance(state, number)
        now = time.monotonic()
        if number % LOG_STEPS == 0 or number == numbers[-1]:
            log(number, spent + now - started, shown)
        ends = now - started > seconds or number == numbers[-1]
        if ends or now - saved > SAVE_SECONDS:
            save(file, state, number + 1, spent + now - started)
            saved = now
        if ends:
            return state, number + 1
    return state, numbers.start


def log_file(path: Path, begin: int, head: str = "") -> IO[str]:
    """A file of lines that begin with their steps, open at its end, without those of step `begin` and later.

    head: the first line of a new file, none by default.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else [f"{head}\n"] if head else []
    kept = [line for line in lines if not (step := line.split(",")[0]).isdecimal() or int(step) < begin]
    write_whole(path, "".join(kept))
    return path.open("a")


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
