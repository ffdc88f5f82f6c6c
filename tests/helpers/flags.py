"""Commands of the command line by the names of their flags, whichever group each is in."""

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from tyro.conf import Suppress

from omni_jax.flags import MediaFlags

C = TypeVar("C")
_SUPPRESSED = get_type_hints(type("_", (), {"__annotations__": {"x": Suppress[int]}}), include_extras=True)["x"]


def command(kind: type[C], **values: Any) -> C:
    """A command with these flags; `media` is a whole group."""
    groups = dict(_groups(kind))
    made = {name: values.pop(name) for name in [*values] if name not in groups and name in _names(kind)}
    made |= {"media": values.pop("media")} if "media" in values else {}
    for name, group in groups.items():
        if own := {flag: values.pop(flag) for flag in [*values] if flag in _names(group)}:
            made[name] = group(**own)
    assert not values, values
    return kind(**made)


def flag_names(kind: type) -> set[str]:
    """The names of all flags of a command; those of media options count as one, `media`."""
    own = _names(kind) - {name for name, _ in _groups(kind)}
    return own.union({"media"}, *(_names(group) for _, group in _groups(kind) if group is not MediaFlags))


def _groups(kind: type) -> Iterator[tuple[str, type]]:
    yield from ((one.name, one.default_factory) for one in _fields(kind) if is_dataclass(one.default_factory))  # type: ignore[misc]


def _names(kind: type) -> set[str]:
    hints = get_type_hints(kind, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {one.name for one in _fields(kind) if _SUPPRESSED.__metadata__[0] not in marks[one.name]}


def _fields(kind: Any) -> tuple[Field, ...]:
    return fields(kind)
