"""Root-mean-square normalisation of arrays. Source: transformers `Qwen3OmniMoeThinkerTextRMSNorm`."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., width] over its root mean square, in float32, cast back, then scaled by weight [width]."""
    x32, width = x.astype(jnp.float32), x.shape[-1]
    if x.size == width:
        # XLA on GPU makes one row's norm and the product after it one kernel if the sum's result needs no constant.
        # Several rows have one kernel anyway, and XLA on CPU takes three times as long to add up this sum for them.
        mean = jnp.sum((jnp.square(x32) + eps) * (1 / width), axis=-1, keepdims=True)
    else:
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps
    return weight.astype(x.dtype) * (x32 * jax.lax.rsqrt(mean)).astype(x.dtype)
