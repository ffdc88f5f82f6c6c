"""How one leaf of the parameter tree is made of checkpoint tensors, and taken apart again.

The key map (`keymap.py`) is a list of `Leaf`. A leaf is a stack of equal blocks, one for each layer, expert or codebook
(or a single block); a block is filled by its sources, each a tensor of the checkpoint, transposed or reshaped. Nothing
here computes on values, so that every placement can be undone bit for bit.

`Leaf.put` and `Leaf.take` are the only code that moves values; conversion, its reverse and verification all use them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from omni_jax.models.param import Axes

Shape = tuple[int, ...]
Index = tuple[int, ...]
Placement = tuple[str, "Source"]
# Start and stop along each axis of a block.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor: its name (with {letters} for stacked axes), shape there, and place in the leaf's block.

    at: index into the block, integers and slices; the whole block when empty. transposed: stored as the transpose of
    what we keep. The remaining difference in shape is a reshape.
    """

    name: str
    shape: Shape
    at: tuple[int | slice, ...] = ()
    transposed: bool = False

    def unpacked(self, tensor: np.ndarray, place: Shape, rows: tuple[int, int] | None) -> np.ndarray:
        """A tensor as it is on disk, or those of its `rows` that were read, in the shape of its place."""
        tensor = tensor.T if self.transposed else tensor
        if rows is None:
            return tensor.reshape(place)
        return tensor if self.transposed else tensor.reshape(-1, *place[1:])


@dataclass(frozen=True)
class Stack:
    """A leading axis of a leaf: the letter that stands for it in names, its logical axis, and the indices on disk."""

    letter: str
    axis: str | None
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Leaf:
    """An array of the parameter tree: path, stacked axes, shape and logical axes of one block, and its sources."""

    path: str
    stack: tuple[Stack, ...]
    block: Shape
    block_axes: Axes
    sources: tuple[Source, ...]

    @property
    def shape(self) -> Shape:
        """The whole array's shape: stacked axes, then the block."""
        return (*(len(s.indices) for s in self.stack), *self.block)

    @property
    def axes(self) -> Axes:
        """The whole array's logical axes."""
        return (*(s.axis for s in self.stack), *self.block_axes)

    def indices(self) -> Iterator[Index]:
        """The index of every block along the stacked axes, in memory order."""
        return product(*(range(len(s.indices)) for s in self.stack))

    def placements(self, index: Index) -> list[Placement]:
        """The names of the tensors that fill block `index`, with their sources."""
        letters = {s.letter: s.indices[i] for s, i in zip(self.stack, index, strict=True)}
        return [(source.name.format(**letters), source) for source in self.sources]

    def put(self, block: np.ndarray, source: Source, tensor: np.ndarray) -> None:
        """Write a tensor as it is on disk into its place in `block`, casting to the block's dtype."""
        place = block[source.at]
        with np.errstate(over="ignore"):  # Who casts, checks for infinities.
            place[...] = (tensor.T if source.transposed else tensor).reshape(place.shape)

    def place_shape(self, source: Source) -> Shape:
        """The shape of a source's place in the block."""
        return np.broadcast_to(np.empty((), bool), self.block)[source.at].shape

    def readable(self, box: Box) -> Box:
        """The smallest box around `box` that can be read by itself: whole along axes that sources share."""
        shared = {axis for s in self.sources for axis, i in enumerate(s.at) if i != slice(None)}
        return tuple((0, n) if axis in shared else box[axis] for axis, n in enumerate(self.block))

    def part(self, source: Source, box: Box) -> tuple[tuple[int, int] | None, tuple[slice, ...]]:
        """What of a source's tensor lies in a readable `box`: its rows (None for all), and of what those unpack to."""
        at = (*source.at, *[slice(None)] * (len(self.block) - len(source.at)))
        axes = [axis for axis, i in enumerate(at) if not isinstance(i, int)]
        inside = [slice(*box[axis]) if at[axis] == slice(None) else slice(None) for axis in axes]
        shape, outer = self.place_shape(source), len(axes) - 1 if source.transposed else 0
        if not shape or inside[outer] == slice(None) or source.shape[0] % shape[outer]:
            return None, tuple(inside)
        # Rows of the tensor that make one step along its outermost axis.
        step, (start, stop) = source.shape[0] // shape[outer], box[axes[outer]]
        inside[outer] = slice(None)
        return (start * step, stop * step), tuple(inside)

    def take(self, block: np.ndarray, source: Source) -> np.ndarray:
        """The tensor as it is on disk, out of a filled block: the inverse of `put`."""
        place = block[source.at]
        if source.transposed:
            return np.ascontiguousarray(place.reshape(source.shape[::-1]).T)
        return np.ascontiguousarray(place).reshape(source.shape)


@dataclass(frozen=True)
class Scope:
    """A prefix of names, paths and stacked axes, under which rows of the key map are written down briefly."""

    name: str
    path: str
    stack: tuple[Stack, ...] = ()

    def under(self, name: str, path: str, *stack: Stack) -> "Scope":
        """A scope further in."""
        return Scope(f"{self.name}{name}", f"{self.path}{path}", (*self.stack, *stack))

    def leaf(self, path: str, shape: Shape, axes: Axes, *sources: Source | str) -> Leaf:
        """One row: a source given by its name alone has the shape of the block."""
        rows = tuple(s if isinstance(s, Source) else Source(s, shape) for s in sources)
        named = tuple(Source(self.name + s.name, s.shape, s.at, s.transposed) for s in rows)
        return Leaf(self.path + path, self.stack, shape, axes, named)

    def affine(self, path: str, name: str, shape: Shape, axes: Axes) -> list[Leaf]:
        """Two rows: a weight of `shape` and a bias as long as its first axis."""
        return [
            self.leaf(f"{path}/weight", shape, axes, f"{name}.weight"),
            self.leaf(f"{path}/bias", shape[:1], axes[:1], f"{name}.bias"),
        ]


def check(table: list[Leaf]) -> None:
    """Raise ValueError unless every path and every tensor name occurs once and every element is filled once."""
    paths, names = [leaf.path for leaf in table], []
    for leaf in table:
        _check_block(leaf)
        names.extend(name for index in leaf.indices() for name, _ in leaf.placements(index))
    for kind, seen in (("path", paths), ("tensor", names)):
        name, count = Counter(seen).most_common(1)[0]
        if count > 1:
            raise ValueError(f"the key map lists {kind} {name!r} {count} times")


def _check_block(leaf: Leaf) -> None:
    """Every element of a block filled exactly once, by tensors of the sizes that their places have."""
    indexed = max((len(s.at) for s in leaf.sources), default=0)
    split = [any(_selects(s.at, axis) for s in leaf.sources) for axis in range(indexed)]
    filled = np.zeros([n if cut else 1 for n, cut in zip(leaf.block, split, strict=False)], np.int64)
    for source in leaf.sources:
        place = np.broadcast_to(np.empty((), bool), leaf.block)[source.at]
        if place.size != prod(source.shape):
            raise ValueError(f"{source.name} {source.shape} does not fill {place.shape} of {leaf.path}")
        filled[source.at] += 1
    if not (filled == 1).all():
        raise ValueError(f"{leaf.path}: elements filled {int(filled.min())} to {int(filled.max())} times, not once")


def _selects(at: tuple[int | slice, ...], axis: int) -> bool:
    return axis < len(at) and at[axis] != slice(None)
