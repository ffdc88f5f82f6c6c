"""Meshes as users write them: "expert=4,data=2" for all parts, "thinker:expert=4;talker:expert=2" for each its own.

This reads the words; whether devices and model allow such a mesh is for `placement` to decide.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from omni_jax.errors import InputError
from omni_jax.sharding import MESH_AXES
from omni_jax.weights.parts import PARTS

T = TypeVar("T")


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes by mesh axis that "expert=4,data=2" gives; InputError for text that is not a mesh."""
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        axis, _, size = (word.strip() for word in entry.partition("="))
        if axis not in MESH_AXES:
            raise InputError(f"mesh {text!r}: no axis is called {axis!r}; choose from {', '.join(MESH_AXES)}")
        if axis in sizes:
            raise InputError(f"mesh {text!r} gives {axis} twice")
        if not size.isascii() or not size.isdigit() or int(size) < 1:
            raise InputError(f"mesh {text!r}: {axis} is {size!r}; give a whole number of at least 1, as in expert=4")
        sizes[axis] = int(size)
    return sizes


def parse_parts(text: str, parts: Iterable[str]) -> dict[str, dict[str, int]]:
    """Mesh sizes by part; without part names one mesh, under "", is for all of them.

    The vocoder shares the Talker's mesh unless it is named. InputError for other parts, or one that is left out.
    """
    if ":" not in text:
        return {"": parse_mesh(text)}
    sizes: dict[str, dict[str, int]] = {}
    for entry in text.split(";"):
        part, _, mesh = (word.strip() for word in entry.partition(":"))
        if part not in PARTS:
            raise InputError(f"mesh {text!r}: no part is called {part!r}; choose from {', '.join(PARTS)}")
        if part in sizes:
            raise InputError(f"mesh {text!r} gives {part} twice")
        sizes[part] = parse_mesh(mesh)
    lost = [part for part in parts if part not in sizes and not (part == "code2wav" and "talker" in sizes)]
    if lost:
        raise InputError(f"mesh {text!r} says nothing of the {lost[0]}; add {lost[0]}:expert=2, or leave the part out")
    return sizes


def own_or_shared(part: str, meshes: Mapping[str, T]) -> T:
    """The mesh of a part, or its sizes, out of those that `parse_parts` names: its own, or the one that it shares."""
    return next(meshes[name] for name in ("", part, "talker") if name in meshes)
