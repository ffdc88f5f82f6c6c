"""What a backward pass keeps of a layer that it does not compute anew.

JAX by itself keeps about twice as much, a copy of the layer's weights and every factor of a product of elements among
it. On CPU the memory costs more time than what is computed again.
"""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

T = TypeVar("T")

NAME = "kept"
# For `jax.checkpoint`: results of matrix products, and what was given to `keep`.
PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(NAME)
)


def keep(x: T) -> T:
    """`x`, arrays of any shape, which the policy `PRODUCTS` keeps: for products that are no single operation."""
    return checkpoint_name(x, NAME)
