"""Values of arguments: their types and ranges.

An error names the argument and what to give instead. Numbers of NumPy and JAX are numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_jax.errors import InputError


def plain(value: Any) -> Any:
    """A scalar of NumPy or JAX, or an array without axes, as the number of Python; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_whole(value: Any) -> bool:
    """Whether a setting is a whole number, of Python, NumPy or JAX."""
    value = plain(value)
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def whole(name: str, value: Any, remedy: str, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most` as an int; InputError, with the remedy, for anything else."""
    found = plain(value)
    if not is_whole(found) or found < least or (most is not None and found > most):
        raise InputError(f"{name} is {shown(value)}; {remedy}")
    return int(found)


def number_of(name: str, value: Any) -> int | float:
    """A number of Python, NumPy or JAX as an int or float; InputError for anything else."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | float | np.floating):
        raise InputError(f"{name} is {shown(value)}; it must be a number")
    return found if isinstance(found, int) else float(found)


def flag(name: str, value: Any) -> bool:
    """True or False as a bool; InputError for what only counts as one, such as the text "no"."""
    if not isinstance(plain(value), bool):
        raise InputError(f"{name} is {shown(value)}; it is True or False")
    return bool(value)


def listed(name: str, value: Any, remedy: str) -> list[Any]:
    """The items of a list, tuple, set, range or array; InputError for text, bytes and anything else."""
    if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence | set | frozenset):
        raise InputError(f"{name} is {shown(value)}; {remedy}")
    return list(value)


def shown(value: Any) -> str:
    """A value as an error shows it: short, and without an object's address."""
    try:
        text = repr(value)
    except Exception:  # the number is too long for text, or somebody's __repr__ fails
        text = ""
    if not text or " at 0x" in text or text.startswith("<"):
        return f"of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... (type {type(value).__name__})"
