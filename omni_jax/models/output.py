"""What the text models give, by name, and what their calls have in common: padding, its mask, and checks of shapes.

A mask is bool [B, T], False at padding. Without a cache padding may be left or right; a cache holds tokens from its
first slot on, so there it is right.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.errors import InputError
from omni_jax.ops.cache import KVCache
from omni_jax.sharding import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertLoad:
    """What tokens ask of the experts of a layer, summed over the tokens that count: float32 [E], or [L, E] of L layers.

    chosen: how many tokens chose each expert. probability: the router's probabilities.
    """

    chosen: jax.Array
    probability: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What a stack gives: hidden [B, T, D], and taps [n, B, T, D], the hidden states that were asked for.

    load: [L, E], what the tokens asked of the experts of each layer (zeros for layers without), if that was asked for.
    """

    hidden: jax.Array
    taps: jax.Array
    load: ExpertLoad | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CachedOutput:
    """As `Output`, and the cache, which holds the tokens now."""

    hidden: jax.Array
    cache: KVCache
    taps: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CachedLogits:
    """logits float32 [B, T, V], and the cache, which holds the tokens now."""

    logits: jax.Array
    cache: KVCache


def left_padding(mask: Array | None, B: int, T: int) -> jax.Array:
    """Padding before each row's first token, int32 [B], by a mask bool [B, T]; 0 without one."""
    return jnp.zeros((B,), jnp.int32) if mask is None else jnp.argmax(jnp.asarray(mask), axis=1).astype(jnp.int32)


def count_valid(extended: KVCache, before: KVCache, mask: Array | None) -> KVCache:
    """The extended cache, holding of the new tokens only those that the mask bool [B, T] keeps; all without one."""
    if mask is None:
        return extended
    if isinstance(mask, np.ndarray) and not mask[:, 0].all():
        raise InputError("mask: a cache takes rows that are padded on the right; prepare them so")
    return replace(extended, length=before.length + jnp.sum(jnp.asarray(mask), axis=1, dtype=jnp.int32))


def check_sequences(name: str, x: jax.Array, form: str, ndim: int, mask: Array | None) -> None:
    """InputError unless x has `ndim` axes, [B, T, ...], and a mask the first two of them."""
    if x.ndim != ndim:
        raise InputError(f"{name} has shape {list(x.shape)}; give {form}, a batch even for one row")
    if mask is not None and mask.shape != x.shape[:2]:
        raise InputError(f"mask has shape {list(mask.shape)}; give bool {list(x.shape[:2])}, one for each token")
