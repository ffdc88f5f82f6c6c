"""Low-rank updates of weights: the product of two thin factors, beside a projection that stays as it is.

    y = W x + scale * B (A x)        A [r, in], B [out, r], rank r

The update is computed by itself: added to half-precision weights it would be lost in their rounding.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """a [..., r, in] and b [..., out, r] of one matrix, or of several; scale: what their product counts."""

    a: jax.Array
    b: jax.Array
    scale: float = field(metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rows x [..., in] through the update: float32 [..., out]; leading axes of x and of the factors broadcast."""
        inner = jnp.einsum("...i,...ri->...r", x, self.a, preferred_element_type=jnp.float32).astype(x.dtype)
        return self.scale * jnp.einsum("...r,...or->...o", inner, self.b, preferred_element_type=jnp.float32)


# How rows [..., in] pass through the update of one matrix.
Update = Callable[[Factors, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatedFactors:
    """Updates of the matrices of a gated MLP, down(silu(gate(x)) * up(x)), or of several."""

    gate: Factors
    up: Factors
    down: Factors

    def first(self, x: jax.Array, update: Update = Factors.__call__) -> jax.Array:
        """Rows x [..., D] through the updates of gate and up, side by side: [..., 2 F]."""
        return jnp.concatenate([update(self.gate, x), update(self.up, x)], axis=-1)

    def second(self, x: jax.Array, update: Update = Factors.__call__) -> jax.Array:
        """Rows x [..., F] through the update of down: [..., D]."""
        return update(self.down, x)
