"""An adapter merged into the parameters of a model: W + scale * B A, in float32, then in the weights' own type.

    parameters on their devices, Adapter -> the same arrays, a layer at a time in place

The sum is made where the weights are, on one device or a mesh, in whichever form they came; only factors are sent.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from omni_jax.sharding import place
from omni_jax.weights.adapters import Adapter
from omni_jax.weights.layout import Leaf, Shape, TensorPlace, place_shape
from omni_jax.weights.trees import flatten, nest


def merge(params: dict, adapter: Adapter, rows: Iterable[Leaf]) -> dict:
    """The parameters with an adapter in them; those that it changes are given up.

    Args:
        params: nested dict of arrays of some parts of a model.
        adapter: made for this model; what it has for other parts is left out.
        rows: the key map of the model.
    """
    arrays = flatten(params)
    for leaf in rows:
        for number, source in enumerate(leaf.sources):
            names = [leaf.placements(index)[number][0].removesuffix(".weight") for index in leaf.indices()]
            if leaf.path in arrays and not adapter.matrices.keys().isdisjoint(names):
                arrays[leaf.path] = _add(arrays[leaf.path], stacked(adapter, names, leaf, source), leaf, source)
    return nest(arrays)


def stacked(adapter: Adapter, names: list[str], leaf: Leaf, source: TensorPlace) -> tuple[np.ndarray, np.ndarray]:
    """A [*stack, r, in] and B [*stack, out, r], scale included, of the modules `names` of a stack.

    Factors of a lower rank than the highest are filled up with zeros; modules that are not adapted have only zeros.
    """
    stack = leaf.shape[: len(leaf.stack)]
    given = {i: adapter.factors(name) for i, name in enumerate(names) if name in adapter.matrices}
    rank = max(len(a) for a, _ in given.values())
    (out, inner), count = source.shape, len(names)
    all_a, all_b = np.zeros((count, rank, inner), np.float32), np.zeros((count, out, rank), np.float32)
    for i, (a, b) in given.items():
        all_a[i, : len(a)], all_b[i, :, : len(a)] = a, b
    return all_a.reshape(*stack, rank, inner), all_b.reshape(*stack, out, rank)


def _add(w: jax.Array, factors: tuple[np.ndarray, np.ndarray], leaf: Leaf, source: TensorPlace) -> jax.Array:
    """An array with the products of factors, A [*stack, r, in] and B [*stack, out, r], added at a source's place."""
    mesh: Any = w.sharding.mesh if isinstance(w.sharding, NamedSharding) else None
    axes = (*leaf.axes[: len(leaf.stack)], None, None)
    a, b = (place(x, axes, mesh) for x in factors)
    add = jax.jit(partial(_added, leaf=leaf, source=source), donate_argnums=0, out_shardings=w.sharding)
    return add(w, a, b)


def _added(w: jax.Array, a: jax.Array, b: jax.Array, leaf: Leaf, source: TensorPlace) -> jax.Array:
    """As `_add`, a layer after the other, so that one layer of float32 is held at a time."""
    if not leaf.stack:
        return _with_product(w, a, b, leaf.block, source)

    def layer(l: Any, w: jax.Array) -> jax.Array:
        one, a_l, b_l = (jax.lax.dynamic_index_in_dim(x, l, keepdims=False) for x in (w, a, b))
        return jax.lax.dynamic_update_index_in_dim(w, _with_product(one, a_l, b_l, leaf.block, source), l, 0)

    return jax.lax.fori_loop(0, w.shape[0], layer, w)


def _with_product(w: jax.Array, a: jax.Array, b: jax.Array, block: Shape, source: TensorPlace) -> jax.Array:
    """w [..., *block] with the products B A, shaped and placed as the source is in the block; leading axes are free."""
    product = jnp.einsum("...or,...ri->...oi", b, a, precision="highest")
    product = product.swapaxes(-1, -2) if source.transposed else product
    product = product.reshape(*product.shape[:-2], *place_shape(block, source.at))
    free = len(w.shape) - len(block)
    # Zeros around it: written into a part of the block, an array on several devices would be gathered.
    widths = [(0, 0)] * w.ndim
    for axis, at in enumerate(source.at, free):
        start, stop, _ = slice(at, at + 1).indices(w.shape[axis]) if isinstance(at, int) else at.indices(w.shape[axis])
        product = jnp.expand_dims(product, axis) if isinstance(at, int) else product
        widths[axis] = (start, w.shape[axis] - stop)
    return (w.astype(jnp.float32) + jnp.pad(product, widths)).astype(w.dtype)
