"""Whether a key map fills every element of every array once."""

from collections import Counter
from math import prod

import numpy as np

from omni_jax.weights.layout import Leaf, place_shape


def check_table(table: list[Leaf]) -> None:
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
        place = place_shape(leaf.block, source.at)
        if prod(place) != prod(source.shape):
            raise ValueError(f"{source.name} {source.shape} does not fill {place} of {leaf.path}")
        filled[source.at] += 1
    if not (filled == 1).all():
        raise ValueError(f"{leaf.path}: elements filled {int(filled.min())} to {int(filled.max())} times, not once")
    for stack, count in zip(leaf.stack, leaf.shape, strict=False):
        if stack.indices is not None and len(stack.indices) != count:
            raise ValueError(f"{leaf.path}: {len(stack.indices)} indices of {stack.letter!r} for an axis of {count}")


def _selects(at: tuple[int | slice, ...], axis: int) -> bool:
    return axis < len(at) and at[axis] != slice(None)
