"""Attention: causal over whole sequences and over a cache (decoding, verification), bidirectional within media rows.

Causal queries come after `offset` earlier tokens of their row and see the keys from `first_valid` on up to themselves.
Logits and softmax are float32. No more than SCORE_BUDGET logits exist at once, or those of FEW_QUERIES queries where
that is more: longer query blocks are mapped over chunks. A causal sequence that is not too long is cut into blocks
instead, each of which meets only keys that one of its queries may see. Longer ones, and several queries over a cache,
go over blocks of keys where no backward pass follows, and merge the softmax of each block with that of those before.
The mask is explicit because library causal flags align a block of queries with the first keys, not the last.

Source of the merged softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.sharding import is_hopper, platform

# The most attention logits that exist at once, over rows, heads, queries and keys: 128 MiB in float32.
SCORE_BUDGET = 1 << 25
# The most queries of a block that reads a cache, in decoding and verification: not mapped, so that the cache is read
# once.
FEW_QUERIES = 16
# A masked logit: finite, so that a query that sees nothing gives numbers (unused ones) instead of NaN.
MASKED = -1e30
# Queries of a sequence that are taken together, and the most such blocks in a program: all their logits may be kept at
# once, so longer sequences go through a loop.
BLOCK = 128
MAX_BLOCKS = 16
# Queries, and keys, of a step where no backward pass needs the logits: on CPU they stay in a core's memory.
FORWARD_BLOCK = 512

# Of queries [B, K, T, G] over some keys: the highest logit and the sum of exponentials [B, K, T, G, 1], relative to it,
# and the sum of values by these weights [B, K, T, G, H].
Weighed = tuple[jax.Array, jax.Array, jax.Array]


def self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first_valid: jax.Array | None = None,
    window: int | None = None,
    forward: bool = False,
) -> jax.Array:
    """Causal attention of whole sequences: q [B, T, K, G, H] over k and v [B, K, T, H] -> [B, T, K, G, H].

    first_valid: int32 [B], the first token of each row that is not padding; or int32 [B, T], the first that each token
    sees. window: how many keys a query sees, its own included. forward: whether the arrays are on one device, and no
    backward pass follows: a fused kernel may then compute it, where there is one for such queries.
    """
    if forward and fits_kernel(q, first_valid, window):
        return _by_kernel(q, k, v, is_causal=True)
    B, T = q.shape[:2]
    if T > BLOCK * MAX_BLOCKS:
        nothing = jnp.zeros((B,), jnp.int32)
        if forward and (first_valid is None or first_valid.ndim == 1):
            return _over_blocks(q, k[None], v[None], 0, nothing, first_valid, window)
        return causal_attention(q, k, v, nothing, first_valid, window)
    blocks = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        oldest = 0 if window is None else max(0, start - window + 1)
        offset = jnp.full((B,), start - oldest, jnp.int32)
        first_key = None if first_valid is None else _of_queries(first_valid, start, stop - start) - oldest
        keys, values = k[:, :, oldest:stop], v[:, :, oldest:stop]
        blocks.append(causal_attention(q[:, start:stop], keys, values, offset, first_key, window))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def fits_kernel(q: jax.Array, first_valid: jax.Array | None = None, window: int | None = None) -> bool:
    """Whether tokamax is here and its Hopper kernel takes queries q [B, T, K, G, H], which see all earlier keys."""
    if first_valid is not None or window is not None:
        return False
    if platform() != "gpu" or find_spec("tokamax") is None or not is_hopper():
        return False
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 64 == 0


def _by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, **seen: Any) -> jax.Array:
    """Attention of q [B, T, K, G, H] over k and v [B, K, S, H], whose scores never leave the chip; seen: of tokamax."""
    import tokamax  # pyright: ignore[reportMissingImports]

    B, T, K, G, H = q.shape
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    heads = q.reshape(B, T, K * G, H)
    return tokamax.dot_product_attention(heads, keys, values, implementation="mosaic", **seen).reshape(q.shape)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    l: Any,
    offset: jax.Array,
    first_valid: jax.Array | None = None,
    window: int | None = None,
    alone: bool = False,
) -> jax.Array:
    """Causal attention of q [B, T, K, G, H] over layer `l` of a cache, k and v [L, B, K, S, H]; no backward pass.

    offset: int32 [B], keys before the first query of each row. first_valid: int32 [B], the first valid key. window:
    keys that a query sees, itself included. alone: whether the arrays are on one device, so that a fused kernel may
    compute it. Of more than FEW_QUERIES queries, blocks of keys that none of them sees are not read.
    """
    T, S = q.shape[1], k.shape[3]
    if T <= FEW_QUERIES:
        return causal_attention(q, k[l], v[l], offset, first_valid, window)
    if alone and fits_kernel(q, first_valid, window):
        seen = causal_mask(jnp.arange(T), S, offset, None, None)[:, None]
        return _by_kernel(q, k[l], v[l], mask=seen, key_value_seq_lengths=jnp.minimum(offset + T, S))
    return _over_blocks(q, k, v, l, offset, first_valid, window)


def _over_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    l: Any,
    offset: jax.Array,
    first_valid: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """As `cached_attention`: queries [B, T, K, G, H] in blocks, over one block of keys after the other."""
    B, T, K, G, H = q.shape
    S = k.shape[3]
    size = min(S, FORWARD_BLOCK)
    most = max(FEW_QUERIES, min(FORWARD_BLOCK, SCORE_BUDGET // (B * K * G * size)))

    def over_keys(start: jax.Array | int, q: jax.Array) -> jax.Array:
        T, before = q.shape[1], offset + start
        query, nothing = jnp.arange(T), jnp.zeros((B, K, T, G, 1))

        def block(i: jax.Array, held: Weighed) -> Weighed:
            # The last block ends with the last key, and leaves out what the one before has read.
            at = jnp.minimum(i * size, S - size)
            keys, values = (jax.lax.dynamic_slice(x, (l, 0, 0, at, 0), (1, B, K, size, H))[0] for x in (k, v))
            first = None if first_valid is None else first_valid - at
            mask = causal_mask(query, size, before - at, first, window) & (jnp.arange(size) >= i * size - at)
            return _merged(held, _weigh(q, keys, values, mask))

        end = -(-jnp.minimum(jnp.max(before) + T, S) // size)
        first = 0 if window is None else jnp.clip((jnp.min(before) + 1 - window) // size, 0, end - 1)
        held = nothing + MASKED, nothing, jnp.zeros((B, K, T, G, H))
        return _attended(jax.lax.fori_loop(first, end, block, held), q.dtype)

    return over_keys(0, q) if T <= most else _in_chunks(over_keys, q, most)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention of q [B, T, K, G, H] over k and v [B, K, S, H] under mask bool [B, T, S], in q's shape and dtype."""
    return _attended(_weigh(q, k, v, mask), q.dtype)


def _weigh(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> Weighed:
    """What `attend` takes of its keys, of the same shapes, to be merged with what others give."""
    T, H = q.shape[1], q.shape[-1]
    if platform() == "cpu":
        # XLA on CPU has no batched product of half-precision numbers that accumulates in float32.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    # Scores stay in the order in which a product leaves them: XLA on CPU would transpose a copy to any other.
    if T <= FEW_QUERIES:
        # Keys first: XLA on CPU copies the other operand transposed, and that should not be the cache.
        scores = jnp.einsum("BKSH,BTKGH->BKTGS", k, q, preferred_element_type=jnp.float32)
    else:
        scores = jnp.einsum("BKTGH,BKSH->BKTGS", q.swapaxes(1, 2), k, preferred_element_type=jnp.float32)
    scores, mask = scores * H**-0.5, mask[:, None, :, None]
    if platform() == "cpu":
        scores = scores + jnp.where(mask, 0.0, MASKED)
    else:
        # Not added: XLA would make a row's mask a bias of the product, in a form that reads no slice of the cache.
        scores = jnp.where(mask, scores, MASKED)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    out = jnp.einsum("BKTGS,BKSH->BKTGH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return highest, jnp.sum(weights, axis=-1, keepdims=True), out


def _merged(one: Weighed, other: Weighed) -> Weighed:
    """What both weighed, relative to the higher of their highest logits."""
    highest = jnp.maximum(one[0], other[0])
    a, b = jnp.exp(one[0] - highest), jnp.exp(other[0] - highest)
    return highest, a * one[1] + b * other[1], a * one[2] + b * other[2]


def _attended(weighed: Weighed, dtype: Any) -> jax.Array:
    """The values' mean by their weights, [B, T, K, G, H]."""
    _, total, out = weighed
    # Divided here, not as weights: a head has fewer numbers than there are keys.
    return (out / total).swapaxes(1, 2).astype(dtype)


def causal_mask(
    query: jax.Array, S: int, offset: jax.Array, first_valid: jax.Array | None, window: int | None
) -> jax.Array:
    """Bool [B, T, S]: key s is visible to query t when first_valid <= s <= offset + t and within `window` keys.

    query: int32 [T], the indices t. offset: int32 [B]. first_valid: int32 [B] or [B, T].
    """
    key = jnp.arange(S)
    position = (offset[:, None] + query)[..., None]
    mask = key <= position
    if first_valid is not None:
        mask &= key >= first_valid.reshape(len(offset), -1)[..., None]
    if window is not None:
        mask &= key > position - window
    return mask


def tree_mask(length: jax.Array, ancestors: jax.Array, S: int) -> jax.Array:
    """Bool [B, T, S] for T nodes of a tree: each sees what its row held at `length` int32 [B], and some nodes.

    ancestors: bool [B, T, n], which of the n nodes after `length` each of the T sees, itself included.
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

    offset: int32 [B], keys before the first query of each row. first_valid: int32 [B], the first valid key (left
    padding), or int32 [B, T], that of each query. window: keys that a query sees, itself included. In a backward pass
    too, no more than about SCORE_BUDGET logits exist at once.
    """
    B, T, K, G, _ = q.shape
    S = k.shape[2]

    def over_keys(start: jax.Array | int, q: jax.Array) -> jax.Array:
        query = start + jnp.arange(q.shape[1])
        first = None if first_valid is None else _of_queries(first_valid, start, q.shape[1])
        return attend(q, k, v, causal_mask(query, S, offset, first, window))

    size = max(FEW_QUERIES, SCORE_BUDGET // (B * K * G * S))
    return over_keys(0, q) if T <= size else _in_chunks(jax.checkpoint(over_keys), q, size)


def _of_queries(first_valid: jax.Array, start: jax.Array | int, T: int) -> jax.Array:
    """`first_valid` of queries `start` to `start + T`: [B] as it is, of [B, T'] a part, which the last may exceed."""
    if first_valid.ndim == 1:
        return first_valid
    index = jnp.minimum(start + jnp.arange(T), first_valid.shape[1] - 1)
    return first_valid[:, index]


def attend_in_rows(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, max_logits: int = SCORE_BUDGET
) -> jax.Array:
    """Bidirectional attention within each row: q, k, v [R, T, N, H] and lengths int32 [R] -> [R, T, N, H] in q's dtype.

    Keys at or beyond a row's length are not seen; what queries there give is meaningless but finite. No more than about
    `max_logits` logits exist at once, in the backward pass too.
    """
    R, T, N, _ = q.shape

    def over_keys(_: jax.Array | int, q: jax.Array) -> jax.Array:
        return _attend_row(q, k, v, lengths)

    chunks = min(T, -(-R * N * T * T // max_logits))
    return over_keys(0, q) if chunks <= 1 else _in_chunks(jax.checkpoint(over_keys), q, -(-T // chunks))


def _attend_row(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """Queries [R, T, N, H] over keys and values [R, S, N, H], of which the first `lengths` int32 [R] count."""
    S, H = k.shape[1], k.shape[3]
    logits = jnp.einsum("RTNH,RSNH->RNTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    seen = jnp.arange(S) < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(seen[:, None, None, :], logits, MASKED), axis=-1)
    out = jnp.einsum("RNTS,RSNH->RTNH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def _in_chunks(attention: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, size: int) -> jax.Array:
    """attention(index of the first query, queries) over q [B, T, ...], `size` queries after the other."""
    B, T, *heads = q.shape
    chunks = -(-T // size)
    padded = jnp.pad(q, [(0, 0), (0, chunks * size - T)] + [(0, 0)] * len(heads))
    blocks = jnp.moveaxis(padded.reshape(B, chunks, size, *heads), 1, 0)
    out = jax.lax.map(lambda block: attention(*block), (jnp.arange(chunks) * size, blocks))
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * size, *heads)[:, :T]
