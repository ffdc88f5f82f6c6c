"""Checks of arguments: their types and ranges.

An error names the argument and what to give instead. Scalars of NumPy and JAX are accepted as numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from omni_jax.errors import InputError

SHOWN = 80  # characters of a value in an error


def plain(value: Any) -> Any:
    """A scalar of NumPy or JAX, or an array without axes [], as a number of Python; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python, NumPy or JAX."""
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
    """True or False as a bool; InputError for anything else, also for 0, 1 or the text "no"."""
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
    """A value as text for an error: short, without an object's address, and as quick for a list of any length."""
    text = ""
    try:
        for piece in _pieces(value):
            text += piece
            if len(text) > SHOWN:
                break
    except Exception:  # an integer that is too long for text, or a __repr__ that fails
        text = ""
    if not text or " at 0x" in text or text.startswith("<"):
        return f"of type {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:60]}... (type {type(value).__name__})"


def _pieces(value: Any) -> Iterator[str]:
    """The pieces of a value's `repr`; of a long text, more of its beginning than is shown."""
    if type(value) is list:
        for i, item in enumerate(value):
            yield ", " if i else "["
            yield from _pieces(item)
        yield "]" if value else "[]"
    elif type(value) is dict:
        for i, (name, item) in enumerate(value.items()):
            yield ", " if i else "{"
            yield from _pieces(name)
            yield ": "
            yield from _pieces(item)
        yield "}" if value else "{}"
    else:
        yield repr(value[: SHOWN + 1] if type(value) in (str, bytes) else value)
