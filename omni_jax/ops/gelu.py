"""The two forms of GELU that the models use.

The audio encoder, the mergers and the vocoder have the exact one, the blocks of the vision encoder the other.
"""

import jax


def gelu_exact(x: jax.Array) -> jax.Array:
    """GELU by the error function, elementwise: x [...] -> [...]."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, elementwise: x [...] -> [...]; differs from the exact one by up to 5e-4."""
    return jax.nn.gelu(x, approximate=True)
