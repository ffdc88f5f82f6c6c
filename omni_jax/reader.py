"""Reads a section of a checkpoint's JSON file; errors name the file, the key and the remedy.

What a section may hold is said once, by the types of the dataclass that is made of it; `Reader.fields` reads them:

    class Encoder:
        width: Annotated[int, Range(1, 10**6)]             # the key "width": a whole number within the range
        layers: Annotated[int, Range(1, 2000), "depth"]    # the same, under another key
        rates: Annotated[tuple[int, ...], Range(1, 1000)]  # a list of them
        mean: Annotated[tuple[float, float], Range(0, 1)]  # a list of two numbers
        start: Annotated[int, Range(0, 10**6)] = 7         # may be absent

Relations between numbers are checked by the dataclass itself, with `Reader.require`.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from omni_jax.errors import ConfigError

SHOWN = 80  # characters of a wrong value that a message repeats


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, both included, and never NaN."""

    least: float
    most: float

    def holds(self, value: Any) -> bool:
        """Whether `value` is a number within the range; true and false are not numbers."""
        return isinstance(value, int | float) and not isinstance(value, bool) and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"from {self.least:,} to {self.most:,}"


# Limits are an order of magnitude above anything published. A larger number is a typo or an attack, and is reported
# before it costs minutes and gigabytes.
Layers = Annotated[int, Range(1, 2_000)]
LayerIds = Annotated[tuple[int, ...], Range(0, 1_999)]
Heads = Annotated[int, Range(1, 10_000)]
Width = Annotated[int, Range(1, 10**6)]
Vocabulary = Annotated[int, Range(1, 10**7)]
Length = Annotated[int, Range(1, 10**9)]  # tokens, frames, keys
Size = Annotated[int, Range(1, 1_000)]  # of a patch, or of a block of merged patches


class Reader:
    """A section of a parsed JSON file; every method raises ConfigError unless the value is there and as expected."""

    def __init__(self, values: Any, path: str, file: str = "config.json"):
        """`path`: of the section in the file ("thinker_config.text_config"), "" for the whole file."""
        if values is None:
            raise ConfigError(f"{file}: section '{path}' is missing; is this a Qwen3-Omni checkpoint?")
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: '{path}' is {shown(values)}, not a section of names and values")
        self.values, self.path, self.file = values, path, file

    def where(self, name: str) -> str:
        """The file and the key, for messages."""
        return f"{self.file}: {shown(f'{self.path}.{name}' if self.path else name)}"

    def section(self, name: str) -> "Reader":
        """The object under `name`."""
        return Reader(self.values.get(name), f"{self.path}.{name}" if self.path else name, self.file)

    def has(self, name: str) -> bool:
        """Whether `name` is present and not null."""
        return self.values.get(name) is not None

    def fields(self, described: type) -> dict[str, Any]:
        """The fields of a dataclass whose types are `Annotated` with a range, and with the key where it differs.

        The section may leave out, or state as null, those that have a default.
        """
        return {field: self.read(key, kind, getattr(described, field, None)) for field, key, kind in _keys(described)}

    def read(self, name: str, kind: Any, absent: Any = None) -> Any:
        """A number or list of numbers of type `kind`, `Annotated` with its range; `absent`, if given, where missing."""
        if absent is not None and not self.has(name):
            return absent
        number, limits, *_ = get_args(kind)
        if get_origin(number) is tuple:
            return self._list(name, get_args(number), limits)
        value = self.get(name, int if number is int else (int, float))
        if not limits.holds(value):
            expected = f"a positive count of at most {limits.most:,}" if limits.least == 1 else f"a number {limits}"
            raise ConfigError(f"{self.where(name)} is {shown(value)}, not {expected}")
        return number(value)

    def _list(self, name: str, items: tuple, limits: Range) -> tuple:
        """A list of numbers; `items`: the type of each, or one type and `...`."""
        values, number = self.get(name, (list, tuple)), items[0]
        count = len(values) if items[-1] is ... else len(items)
        if len(values) != count or not all(limits.holds(v) and isinstance(v, int | number) for v in values):
            expected = f"{'a list of' if items[-1] is ... else count} numbers {limits}{', all whole' * (number is int)}"
            raise ConfigError(f"{self.where(name)} is {shown(values)}, not {expected}")
        return tuple(number(v) for v in values)

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of `name`, which must be of type `kind`; true and false are not numbers."""
        if name not in self.values:
            raise ConfigError(
                f"{self.where(name)} is missing; take {os.path.basename(self.file)} from the checkpoint itself"
            )
        value = self.values[name]
        if isinstance(value, bool) and kind is not bool or not isinstance(value, kind):
            raise ConfigError(f"{self.where(name)} is {shown(value)}, not of type {_names(kind)}")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names, empty if it is missing."""
        values = self.get(name, (list, tuple)) if self.has(name) else ()
        if not all(isinstance(v, str) for v in values):
            raise ConfigError(f"{self.where(name)} is {shown(values)}, not a list of names")
        return tuple(values)

    def flag(self, name: str, absent: bool) -> bool:
        """true or false; `absent` where it is missing."""
        return self.get(name, bool) if self.has(name) else absent

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse a value of `name` that this implementation does not support."""
        if name in self.values and not is_one_of(self.values[name], allowed):
            raise ConfigError(f"{self.where(name)} is {shown(self.values[name])}; supported: {list(allowed)}")

    def require(self, *relations: tuple[bool, str]) -> None:
        """Refuse the section if a relation does not hold, with the sentence of the first one."""
        for holds, sentence in relations:
            if not holds:
                raise ConfigError(f"{self.file}: {self.path}: {sentence}" if self.path else f"{self.file}: {sentence}")


@cache
def _keys(described: type) -> list[tuple[str, str, Any]]:
    """Field, key and type of each number that a dataclass describes."""
    hints = get_type_hints(described, include_extras=True).items()
    return [(field, (*get_args(kind)[2:], field)[0], kind) for field, kind in hints if get_origin(kind) is Annotated]


def is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Whether a value is one of `allowed`; 1 equals 1.0, but not true."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def shown(value: Any) -> str:
    """A value as messages quote it, shortened if it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists thousands deep
        return f"a value of type {type(value).__name__}, too large to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
