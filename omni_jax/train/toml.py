"""Configurations as TOML: a recipe's own fields on top, its groups as tables.

    recipe = "sft"
    train_vision = true

    [run]
    steps = 1000

What is not stated keeps its default. An unknown name or a value of another type is one error that names it.
"""

import tomllib
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from difflib import get_close_matches
from json import dumps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omni_jax.errors import InputError
from omni_jax.files import read_text, user_path
from omni_jax.inputs.values import shown
from omni_jax.train.settings import Call, Recipe, values_of

R = TypeVar("R", bound=Recipe)
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path as a text"}


def write(recipe: Recipe) -> str:
    """A recipe as the text of a TOML file; settings that are None are left out."""
    own, tables = [f"recipe = {_text(recipe.NAME)}"], []
    for one in fields(recipe):
        value = getattr(recipe, one.name)
        if not is_dataclass(value):
            own += _lines(one.name, value)
        elif not isinstance(value, Call):
            lines = [line for inner in fields(value) for line in _lines(inner.name, getattr(value, inner.name))]
            tables.append("\n".join([f"[{one.name}]", *lines]))
    return "\n\n".join(["\n".join(own), *tables]) + "\n"


def read(kind: type[R], path: Path, absent: Any = MISSING) -> R:
    """The recipe that a TOML file states.

    absent: what stands for a setting that has no default and is not stated; by default that is an error. InputError
    names the file, and the setting that is unknown or has a wrong value.
    """
    values = read_table(path)
    named = values.pop("recipe", kind.NAME)
    if named != kind.NAME:
        raise InputError(f"{path}: is for the recipe {shown(named)}, not {kind.NAME!r}; give the file of this one")
    made = _made(kind, values, f"{path}: ", None, absent)
    for name, value in values_of(made).items():
        if value is MISSING:
            raise InputError(f"{path}: {name} is not stated; add it")
    return made


def read_table(path: Path) -> dict[str, Any]:
    """The values of a TOML file; InputError if it cannot be read or is none."""
    try:
        return tomllib.loads(read_text(path, error=InputError, remedy="name a TOML file"))
    except tomllib.TOMLDecodeError as wrong:
        raise InputError(f"{path}: no valid TOML ({wrong})") from None


def _made(kind: type[Any], values: dict[str, Any], place: str, base: Any, absent: Any) -> Any:
    """A dataclass of the values that are stated and, for the others, of `base` or the defaults.

    place: the file, and the table in it, as errors name them.
    """
    known = {one.name: one for one in fields(kind) if one.name != "call"}
    _check_names(values, known, place)
    hints, made = get_type_hints(kind), {}
    for name, one in known.items():
        if is_dataclass(hints[name]):
            group = None if one.default_factory is MISSING else one.default_factory()
            made[name] = _made(hints[name], _table(values, name, place), f"{place}{name}.", group, absent)
        elif name in values:
            made[name] = _typed(hints[name], values[name], f"{place}{name}")
        elif base is None and one.default is MISSING:
            made[name] = absent
    return kind(**made) if base is None else replace(base, **made)


def _check_names(values: dict[str, Any], known: dict[str, Field], place: str) -> None:
    for name in values:
        if name not in known:
            near = get_close_matches(name, known, 1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InputError(f"{place}{name}: there is no such setting; {remedy}")


def _table(values: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"{place}{name} is {shown(table)}; it must be a table, [{name}]")
    return table


def _typed(hint: Any, value: Any, name: str) -> Any:
    """A value of TOML as the type of a setting; InputError for one that is of another type."""
    kinds = [one for one in get_args(hint) if one is not NoneType] if get_origin(hint) in (Union, UnionType) else [hint]
    for kind in kinds:
        if get_origin(kind) is Literal and type(value) is str and value in get_args(kind):
            return value
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_typed(get_args(kind)[0], one, name) for one in value)
        if kind is float and type(value) in (int, float):
            return float(value)
        if kind is Path and type(value) is str:
            return user_path(value, name)
        if kind is type(value):
            return value
    raise InputError(f"{name} is {shown(value)}; it must be {' or '.join(map(_in_words, kinds))}")


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    return f"a list, each {_in_words(get_args(kind)[0])}" if get_origin(kind) is tuple else WORDS[kind]


def _lines(name: str, value: Any) -> list[str]:
    return [] if value is None else [f"{name} = {_text(value)}"]


def _text(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    # JSON escapes all that TOML wants escaped, but for one character.
    return (
        repr(value)
        if isinstance(value, int | float)
        else dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    )
