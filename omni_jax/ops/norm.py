"""Root-mean-square normalisation of arrays. Source: transformers `Qwen3OmniMoeThinkerTextRMSNorm`."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., width] over its root mean square, in float32, cast back, then scaled by weight [width]."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * x32.astype(x.dtype)
