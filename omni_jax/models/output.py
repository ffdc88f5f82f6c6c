"""What the text models give, by name, and what their calls have in common: padding, its mask, and checks of shapes.

A mask is bool [B, T], False at padding. Without a cache padding may be left or right; a cache holds tokens from its
first slot on, so there it is right.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

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

    def __repr__(self) -> str:
        return f"CachedLogits(logits {list(self.logits.shape)}, {self.cache})"


def left_padding(mask: Array | None, B: int, T: int) -> jax.Array:
    """Padding before each row's first token, int32 [B], by a mask bool [B, T]; 0 without one."""
    return jnp.zeros((B,), jnp.int32) if mask is None else jnp.argmax(jnp.asarray(mask), axis=1).astype(jnp.int32)


def count_valid(extended: KVCache, before: KVCache, mask: Array | None) -> KVCache:
    """The extended cache, holding of the new tokens only those that the mask bool [B, T] keeps; all without one."""
    if mask is None:
        return extended
    return replace(extended, length=before.length + jnp.sum(jnp.asarray(mask), axis=1, dtype=jnp.int32))


def check_sequences(
    name: str,
    x: jax.Array,
    form: str,
    ndim: int,
    position_ids: Array | None,
    mask: Array | None,
    cache: KVCache | None,
) -> None:
    """InputError unless x has `ndim` axes, [B, T, ...], and the others fit it; values are checked outside `jit`."""
    if x.ndim != ndim or not all(x.shape[:2]):
        raise InputError(f"{name} has shape {list(x.shape)}; give {form}, a batch even for one row, with tokens")
    B, T = x.shape[:2]
    if position_ids is not None and np.shape(position_ids) != (3, B, T):
        raise InputError(f"position_ids has shape {list(np.shape(position_ids))}; give float32 {[3, B, T]}")
    if mask is not None and np.shape(mask) != (B, T):
        raise InputError(f"mask has shape {list(np.shape(mask))}; give bool {[B, T]}, one for each token")
    if cache is not None:
        _check_cache(name, B, T, mask, cache)


def _check_cache(name: str, B: int, T: int, mask: Array | None, cache: KVCache) -> None:
    """InputError unless a cache takes B rows of T tokens, padded as the mask says."""
    if cache.rows != B:
        raise InputError(f"the cache has {cache.rows} rows, and {name} has {B}; give each row of the cache its tokens")
    held = 0 if isinstance(cache.length, Tracer) else int(np.max(cache.length))
    if held + T > cache.capacity:
        raise InputError(f"the cache has room for {cache.capacity} tokens, and these need {held + T}; make it larger")
    if mask is not None and not isinstance(mask, Tracer) and not np.asarray(mask)[:, 0].all():
        raise InputError("mask: a cache takes rows that are padded on the right; prepare them so")
