"""Weights of eight bits: whole numbers, and for each output the scale that one step of them counts.

They stay int8 in memory. A product widens what it reads to the type of the rows, and scales its outputs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Weights [..., out, in], as on disk: values int8 [..., out, in] times scale [..., out]."""

    values: jax.Array
    scale: jax.Array


Weight = jax.Array | Int8


def product(rows: jax.Array, weight: Weight) -> jax.Array:
    """Rows [R, in] times a weight, [in, out] or an `Int8` [out, in]: float32 [R, out]."""
    if not isinstance(weight, Int8):
        return jnp.dot(rows, weight, preferred_element_type=jnp.float32)
    out = jnp.einsum("RI,OI->RO", rows, weight.values.astype(rows.dtype), preferred_element_type=jnp.float32)
    return out * weight.scale.astype(jnp.float32)


def summed(rows: jax.Array, weight: Weight) -> jax.Array:
    """As `product`, of rows [..., in] by weights of their own [..., in, out]: one multiplication and one sum."""
    rows = rows.astype(jnp.float32)
    if not isinstance(weight, Int8):
        return jnp.sum(rows[..., None] * weight.astype(jnp.float32), axis=-2)
    return jnp.sum(rows[..., None, :] * weight.values.astype(jnp.float32), axis=-1) * weight.scale.astype(jnp.float32)


def joined(weight: Weight) -> Weight:
    """Gate and up [..., in, 2, F], or an `Int8` [..., 2, F, in], with their outputs along one axis of 2 F."""
    if not isinstance(weight, Int8):
        return weight.reshape(*weight.shape[:-2], -1)
    values, scale = weight.values, weight.scale
    return Int8(values.reshape(*values.shape[:-3], -1, values.shape[-1]), scale.reshape(*scale.shape[:-2], -1))
