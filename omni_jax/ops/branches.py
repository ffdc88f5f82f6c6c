"""Attention of branches: short continuations from many places of a row at once, as drafters are trained.

A branch sees the keys of its row from some token on up to the place where it begins, and keys of its own. Keys of the
row are shared by all branches and never copied. Logits and softmax are float32; no more than about SCORE_BUDGET logits
exist at once, in the backward pass too.

Source: the block mask of DFlash's training and the diagonal keys of EAGLE-3's, each written there as one mask over the
keys of the row and those of all branches, most of which no query may see.
"""

import jax
import jax.numpy as jnp

from omni_jax.ops.attention import MASKED, SCORE_BUDGET
from omni_jax.sharding import platform


def attend_branches(
    q: jax.Array,
    row: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    first: jax.Array,
    stop: jax.Array,
    own_mask: jax.Array,
) -> jax.Array:
    """Attention of A branches: q [B, A, W, K, G, H] -> [B, A, W, K, G, H].

    row: keys and values [B, K, S, H] of the rows. own: keys and values [B, A, U, K, H] of the branches. first: int32
    [B, A, W], the first key of its row that each query sees. stop: int32 [B, A], the first that a branch does not see.
    own_mask: bool [W, U], which keys of its branch each query sees.
    """
    B, A, W, K, G, _ = q.shape
    size = max(1, SCORE_BUDGET // (B * K * G * W * (row[0].shape[2] + own[0].shape[2])))
    if A <= size:
        return _attend(q, row, own, first, stop, own_mask)
    chunks = -(-A // size)

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * size - A)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, chunks, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def some(part: tuple) -> jax.Array:
        q, own, first, stop = part
        return _attend(q, row, own, first, stop, own_mask)

    out = jax.lax.map(some, jax.tree.map(cut, (q, own, first, stop)))
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * size, *out.shape[3:])[:, :A]


def _attend(
    q: jax.Array,
    row: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    first: jax.Array,
    stop: jax.Array,
    own_mask: jax.Array,
) -> jax.Array:
    dtype, S = q.dtype, row[0].shape[2]
    if platform() == "cpu":
        # XLA on CPU has no batched product of half-precision numbers that accumulates in float32.
        q, row, own = jax.tree.map(lambda x: x.astype(jnp.float32), (q, row, own))
    before = jnp.einsum("BAWKGH,BKSH->BKGAWS", q, row[0], preferred_element_type=jnp.float32)
    within = jnp.einsum("BAWKGH,BAUKH->BKGAWU", q, own[0], preferred_element_type=jnp.float32)
    key = jnp.arange(S)
    seen = (key >= first[..., None]) & (key < stop[..., None, None])
    scores = jnp.concatenate(
        [jnp.where(seen[:, None, None], before, MASKED), jnp.where(own_mask, within, MASKED)], axis=-1
    )
    weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKGAWS,BKSH->BAWKGH", weights[..., :S], row[1], preferred_element_type=jnp.float32)
    out += jnp.einsum("BKGAWU,BAUKH->BAWKGH", weights[..., S:], own[1], preferred_element_type=jnp.float32)
    return out.astype(dtype)
