"""Reads a section of a checkpoint's JSON file and names the file, the key and the remedy when something is wrong."""

from typing import Any

from omni_jax.errors import ConfigError


class Reader:
    """A section of a parsed JSON file; every method raises ConfigError unless the value is there and as expected."""

    def __init__(self, values: Any, path: str, file: str = "config.json"):
        """`path`: where in the file the section stands ("thinker_config.text_config"), "" for the whole file."""
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{file}: '{path}' is {values!r}, not a section of names and values")
        if values is None:
            raise ConfigError(f"{file}: section '{path}' is missing; is this a Qwen3-Omni checkpoint?")
        self.values, self.path, self.file = values, path, file

    def where(self, name: str) -> str:
        """The file and the key, for messages."""
        return f"{self.file}: '{self.path}.{name}'" if self.path else f"{self.file}: '{name}'"

    def section(self, name: str) -> "Reader":
        """The object under `name`."""
        return Reader(self.values.get(name), f"{self.path}.{name}" if self.path else name, self.file)

    def has(self, name: str) -> bool:
        """Whether `name` is stated and not null."""
        return self.values.get(name) is not None

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of `name`, of type `kind`; numbers are never true or false."""
        if name not in self.values:
            raise ConfigError(f"{self.where(name)} is missing; take {self.file} from the checkpoint itself")
        value = self.values[name]
        if isinstance(value, bool) and kind is not bool or not isinstance(value, kind):
            raise ConfigError(f"{self.where(name)} is {value!r}, not of type {_names(kind)}")
        return value

    def count(self, name: str) -> int:
        """A whole number from 1 on."""
        value = self.get(name, int)
        if value < 1:
            raise ConfigError(f"{self.where(name)} is {value}, not a positive count")
        return value

    def number(self, name: str) -> float:
        """A number."""
        return float(self.get(name, (int, float)))

    def counts(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self.get(name, (list, tuple))
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise ConfigError(f"{self.where(name)} is {values!r}, not a list of numbers")
        return tuple(int(v) for v in values)

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names, empty if there is none."""
        values = self.get(name, (list, tuple)) if self.has(name) else ()
        if not all(isinstance(v, str) for v in values):
            raise ConfigError(f"{self.where(name)} is {values!r}, not a list of names")
        return tuple(values)

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse a switch that this implementation does not have."""
        if name in self.values and self.values[name] not in allowed:
            raise ConfigError(f"{self.where(name)} is {self.values[name]!r}; supported: {list(allowed)}")


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
