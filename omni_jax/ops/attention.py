"""Causal grouped-query attention: whole sequences, and blocks of queries against a cache (decode, verification).

Queries sit behind `offset` earlier tokens of their row and see the keys from `first_valid` on up to themselves. Logits and
softmax are float32. The score matrix keeps to a fixed budget, or to FEW_QUERIES queries where those are more: longer
query blocks are mapped over chunks, and a sequence that is not too long is cut into blocks that meet no key that none
of their queries may see. The mask is explicit because library causal flags align a block of queries with the first
keys, not the last.
"""

import jax
import jax.numpy as jnp

from omni_jax.sharding import platform

# Largest score block in elements: 128 MB of float32.
SCORE_BUDGET = 1 << 25
# Queries of a block that reads a cache, in decoding and verification: never mapped, so that the cache is read once.
FEW_QUERIES = 16
# A masked logit: finite, so that a row that sees nothing gives numbers (unused ones) instead of NaN.
MASKED = -1e30
# Queries of a sequence that are taken together, and the most blocks that a program holds: their scores may all be kept
# at once, so longer sequences go through a loop.
BLOCK = 128
MAX_BLOCKS = 16


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first_valid: jax.Array | None = None, window: int | None = None
) -> jax.Array:
    """Causal attention of whole sequences: q [B, T, K, G, H], k and v [B, K, T, H]; `first_valid` and `window` as below."""
    B, T = q.shape[:2]
    if T > BLOCK * MAX_BLOCKS:
        return causal_attention(q, k, v, jnp.zeros((B,), jnp.int32), first_valid, window)
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        oldest = 0 if window is None else max(0, start - window + 1)
        offset = jnp.full((B,), start - oldest, jnp.int32)
        first_key = None if first_valid is None else first_valid - oldest
        keys, values = k[:, :, oldest:stop], v[:, :, oldest:stop]
        blocks.append(causal_attention(q[:, start:stop], keys, values, offset, first_key, window))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of q [B, T, K, G, H] over k and v [B, K, S, H] under mask bool [B, T, S], in q's shape and dtype."""
    T, H, dtype = q.shape[1], q.shape[-1], q.dtype
    if platform() == "cpu":
        # XLA on CPU has no batched product of half-precision numbers that accumulates in float32.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    # Scores stay in the order in which a product leaves them: XLA on CPU would transpose a copy to any other.
    if T <= FEW_QUERIES:
        # Keys first: XLA on CPU copies the other operand transposed, and that should not be the cache.
        scores = jnp.einsum("BKSH,BTKGH->BKTGS", k, q, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("BKTGH,BKSH->BKTGS", q.swapaxes(1, 2), k, preferred_element_type=jnp.float32)
    scores = scores * H**-0.5 + jnp.where(mask, 0.0, MASKED)[:, None, :, None]
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    out = jnp.einsum("BKTGS,BKSH->BKTGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    # Divided here, not as weights: a head has fewer numbers than there are keys.
    out = out / jnp.sum(weights, axis=-1, keepdims=True)
    return out.swapaxes(1, 2).astype(dtype)


def causal_mask(
    query: jax.Array, S: int, offset: jax.Array, first_valid: jax.Array | None, window: int | None
) -> jax.Array:
    """Bool [B, T, S]: key s is visible to query index t [T] when first_valid <= s <= offset + t and within `window` keys."""
    key = jnp.arange(S)
    position = (offset[:, None] + query)[..., None]
    mask = key <= position
    if first_valid is not None:
        mask &= key >= first_valid[:, None, None]
    if window is not None:
        mask &= key > position - window
    return mask


def tree_mask(length: jax.Array, ancestors: jax.Array, S: int) -> jax.Array:
    """Bool [B, T, S] for T nodes of a tree: each sees what its row held at `length` int32 [B], and some nodes.

    ancestors: bool [B, T, n], which of the n nodes behind `length` each of the T sees, itself included.
    """
    B, T, n = ancestors.shape
    node = jnp.broadcast_to((jnp.arange(S) - length[:, None])[:, None], (B, T, S))
    seen = jnp.take_along_axis(ancestors, jnp.clip(node, 0, n - 1), axis=2)
    return (node < 0) | ((node < n) & seen)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    offset: jax.Array,
    first_valid: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Causal attention of q [B, T, K, G, H] over k and v [B, K, S, H].

    offset: int32 [B], keys before the first query of each row. first_valid: int32 [B], first valid key (left padding).
    window: keys that a query sees, itself included.
    """
    B, T, K, G, H = q.shape
    S = k.shape[2]
    chunk = max(FEW_QUERIES, SCORE_BUDGET // (B * K * G * S))
    if T <= chunk:
        return attend(q, k, v, causal_mask(jnp.arange(T), S, offset, first_valid, window))
    chunks = -(-T // chunk)
    padded = jnp.pad(q, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * 3)
    blocks = jnp.moveaxis(padded.reshape(B, chunks, chunk, K, G, H), 1, 0)

    def one(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, q_block = block
        return attend(q_block, k, v, causal_mask(start + jnp.arange(chunk), S, offset, first_valid, window))

    out = jax.lax.map(one, (jnp.arange(chunks) * chunk, blocks))
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * chunk, K, G, H)[:, :T]
