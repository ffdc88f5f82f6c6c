"""Rotary position embedding, plain and interleaved multimodal.

Multimodal positions are three numbers per token (time, height, width). Each frequency pair follows one of the three:
starting from time everywhere, height takes pairs 1, 4, 7, ... and width takes 2, 5, 8, ..., up to three times their
section. Positions may be fractional; angles are float32, cos and sin are cast to the activations' dtype.

Source: transformers `Qwen3OmniMoeThinkerTextRotaryEmbedding`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decoder_config import RopeConfig


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Inverse frequencies, float32 [H/2]."""
    return (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))).astype(np.float32)


def text_positions(start: jax.Array, T: int) -> jax.Array:
    """Positions float32 [3, B, T] of T tokens of text from `start` int32 [B] on: the same number three times."""
    position = (start[:, None] + jnp.arange(T)).astype(jnp.float32)
    return jnp.broadcast_to(position, (3, *position.shape))


def rope(position_ids: jax.Array, head_dim: int, config: RopeConfig, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, H] in `dtype` for float32 positions [3, B, T], or [B, T] where positions are plain."""
    angles = position_ids[..., None].astype(jnp.float32) * frequencies(head_dim, config.theta)
    if position_ids.ndim == 3:
        angles = _interleave(angles, config.mrope_section)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _interleave(angles: jax.Array, section: tuple[int, int, int] | None) -> jax.Array:
    """[3, B, T, H/2] -> [B, T, H/2]: pick for each frequency the position that it follows."""
    if section is None:
        raise ValueError("three positions per token need an mrope_section")
    source = np.zeros(angles.shape[-1], np.int32)
    for axis in (1, 2):
        source[axis : 3 * section[axis] : 3] = axis
    return jnp.where(source == 1, angles[1], jnp.where(source == 2, angles[2], angles[0]))


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, T, ..., H] by cos and sin [B, T, H]; the halves of H form the pairs."""
    middle = (1,) * (x.ndim - 3)
    cos, sin = (a.reshape(*a.shape[:2], *middle, a.shape[-1]) for a in (cos, sin))
    x1, x2 = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-x2, x1], axis=-1) * sin
