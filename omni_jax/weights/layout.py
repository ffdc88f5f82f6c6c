"""How one array of the parameter tree is made of checkpoint tensors, and taken apart again.

The key maps (`keymap`, `draft_keymap`) are lists of `Leaf`. A leaf is a stack of equal blocks, one for each layer,
expert or codebook (or a single block); a block is filled by its sources, each a tensor of the checkpoint, transposed or
reshaped. Nothing here computes on values, so every placement can be undone bit for bit. A leaf's shape and axes are
those that its module declares, and the shapes of the tensors follow from them.

`Leaf.put` and `Leaf.take` are the only code that moves values; conversion, its reverse and verification all use them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod

import numpy as np

from omni_jax.models.param import Axes
from omni_jax.weights.parts import Shape

Index = tuple[int, ...]
# A tensor by its name on disk, and its place.
NamedTensor = tuple[str, "TensorPlace"]
# Start and stop along each axis of an array or of a block.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TensorPlace:
    """A checkpoint tensor: its name (with {letters} for stacked axes), shape there, and place in the leaf's block.

    at: index into the block, integers and slices; the whole block when empty. transposed: stored as the transpose of
    what we keep. The remaining difference in shape is a reshape.
    """

    name: str
    shape: Shape
    at: tuple[int | slice, ...] = ()
    transposed: bool = False

    def unpacked(self, tensor: np.ndarray, place: Shape, rows: tuple[int, int] | None) -> np.ndarray:
        """A tensor [...] of the stored shape, or its `rows` from start to stop, shaped as `place`, or its rows."""
        tensor = tensor.T if self.transposed else tensor
        if rows is None:
            return tensor.reshape(place)
        return tensor if self.transposed else tensor.reshape(-1, *place[1:])


@dataclass(frozen=True)
class Stored:
    """How a key map writes a source down: by what differs on disk from its place in the block.

    merged: how many axes of the place make each axis on disk, such as (3, 1) for [K, G, H, D] as [K * G * H, D]; None
    where they are the same. shape: on disk, where the place has fewer axes.
    """

    name: str
    at: tuple[int | slice, ...] = ()
    merged: tuple[int, ...] | None = None
    transposed: bool = False
    shape: Shape | None = None

    def source(self, prefix: str, block: Shape) -> TensorPlace:
        """The source that fills its place in a block of this shape."""
        shape = self.shape or merge_axes(place_shape(block, self.at), self.merged)
        return TensorPlace(prefix + self.name, shape[::-1] if self.transposed else shape, self.at, self.transposed)


@dataclass(frozen=True)
class Stack:
    """A leading axis of a leaf: its letter in names, and the indices on disk, by default all from 0."""

    letter: str
    indices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Leaf:
    """An array of the parameter tree: its path, its stacked axes, its shape and logical axes, and its sources.

    int8: whether it holds whole numbers of eight bits, which are never cast.
    """

    path: str
    stack: tuple[Stack, ...]
    shape: Shape
    axes: Axes
    sources: tuple[TensorPlace, ...]
    int8: bool = False

    @property
    def block(self) -> Shape:
        """The shape of one block, which follows the stacked axes."""
        return self.shape[len(self.stack) :]

    def indices(self) -> Iterator[Index]:
        """The index of every block along the stacked axes, in memory order."""
        return product(*map(range, self.shape[: len(self.stack)]))

    def placements(self, index: Index) -> list[NamedTensor]:
        """The tensors of one block, by their names on disk, with their places."""
        letters = {s.letter: i if s.indices is None else s.indices[i] for s, i in zip(self.stack, index, strict=True)}
        return [(source.name.format(**letters), source) for source in self.sources]

    def put(self, block: np.ndarray, source: TensorPlace, tensor: np.ndarray) -> None:
        """Write a tensor as stored, `source.shape`, into its place in `block`, casting to the block's dtype."""
        place = block[source.at]
        with np.errstate(over="ignore"):  # Callers that cast look for infinities.
            place[...] = (tensor.T if source.transposed else tensor).reshape(place.shape)

    def take(self, block: np.ndarray, source: TensorPlace) -> np.ndarray:
        """The tensor as stored, `source.shape`, out of a filled block: the inverse of `put`."""
        place = block[source.at]
        if source.transposed:
            return np.ascontiguousarray(place.reshape(source.shape[::-1]).T)
        return np.ascontiguousarray(place).reshape(source.shape)

    def readable(self, box: Box) -> Box:
        """The smallest box around `box` that can be read by itself: whole along axes that sources share."""
        shared = {axis for s in self.sources for axis, i in enumerate(s.at) if i != slice(None)}
        return tuple((0, n) if axis in shared else box[axis] for axis, n in enumerate(self.block))

    def part(self, source: TensorPlace, box: Box) -> tuple[tuple[int, int] | None, tuple[slice, ...]]:
        """The rows of a tensor that a readable `box` needs (None for all), and the part of them that is the box."""
        at = (*source.at, *[slice(None)] * (len(self.block) - len(source.at)))
        axes = [axis for axis, i in enumerate(at) if not isinstance(i, int)]
        inside = [slice(*box[axis]) if at[axis] == slice(None) else slice(None) for axis in axes]
        shape, outer = place_shape(self.block, source.at), len(axes) - 1 if source.transposed else 0
        if not shape or inside[outer] == slice(None) or source.shape[0] % shape[outer]:
            return None, tuple(inside)
        # Rows of the tensor that make one step along its outermost axis.
        step, (start, stop) = source.shape[0] // shape[outer], box[axes[outer]]
        inside[outer] = slice(None)
        return (start * step, stop * step), tuple(inside)


def place_shape(block: Shape, at: tuple[int | slice, ...]) -> Shape:
    """The shape of the place `at` in a block."""
    return np.broadcast_to(np.empty((), bool), block)[at].shape


def merge_axes(shape: Shape, merged: tuple[int, ...] | None) -> Shape:
    """A shape with runs of its axes made one, of the lengths in `merged`: (2, 3, 5) by (2, 1) is (6, 5)."""
    if merged is None:
        return shape
    return tuple(prod(shape[end - count : end]) for count, end in zip(merged, accumulate(merged), strict=True))


@dataclass(frozen=True)
class Scope:
    """A prefix of names, paths and stacked axes, under which rows of a key map are written down briefly.

    arrays: shape and logical axes of every declared array by its path, as `parts.declared_arrays` gives them.
    """

    arrays: Mapping[str, tuple[Shape, Axes]]
    name: str = ""
    path: str = ""
    stack: tuple[Stack, ...] = ()

    def under(self, name: str, path: str, *stack: Stack) -> "Scope":
        """A scope further in."""
        return replace(self, name=self.name + name, path=self.path + path, stack=(*self.stack, *stack))

    def leaf(self, path: str, *stored: Stored | str, int8: bool = False) -> Leaf:
        """One row: a source given by its name alone is stored as the block is."""
        shape, axes = self.arrays[self.path + path]
        block = shape[len(self.stack) :]
        sources = (Stored(s) if isinstance(s, str) else s for s in stored)
        return Leaf(self.path + path, self.stack, shape, axes, tuple(s.source(self.name, block) for s in sources), int8)

    def affine(self, path: str, name: str) -> list[Leaf]:
        """Two rows: a weight and a bias."""
        return [self.leaf(f"{path}/weight", f"{name}.weight"), self.leaf(f"{path}/bias", f"{name}.bias")]
