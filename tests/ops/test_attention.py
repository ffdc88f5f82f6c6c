"""Causal attention against hand-written masks, chunking, and the cache that it reads."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.ops import attention
from omni_jax.ops import cache as cache_module
from omni_jax.ops.cache import KVCache, capacity_for


def arrays(B: int, T: int, S: int, K: int = 2, G: int = 3, H: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(T * 100 + S)
    shapes = ((B, T, K, G, H), (B, K, S, H), (B, K, S, H))
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return q, k, v


def test_masks_by_hand() -> None:
    offset, first = jnp.array([2]), jnp.array([1])
    mask = attention.causal_mask(jnp.arange(3), 6, offset, None, None)[0].astype(int)
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    mask = attention.causal_mask(jnp.arange(3), 6, offset, first, None)[0].astype(int)
    assert mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]
    mask = attention.causal_mask(jnp.arange(3), 6, offset, None, 2)[0].astype(int)
    assert mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_equals_a_plain_softmax() -> None:
    q, k, v = arrays(2, 4, 9)
    got = attention.causal_attention(q, k, v, jnp.array([5, 2]))
    for b, offset in enumerate((5, 2)):
        for t in range(4):
            seen = slice(0, offset + t + 1)
            scores = np.einsum("KGH,KSH->KGS", q[b, t], k[b, :, seen]) / np.sqrt(8)
            w = np.exp(scores - scores.max(-1, keepdims=True))
            want = np.einsum("KGS,KSH->KGH", w / w.sum(-1, keepdims=True), v[b, :, seen])
            np.testing.assert_allclose(got[b, t], want, atol=1e-6)


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays(2, 50, 50)
    offset, first = jnp.zeros(2, jnp.int32), jnp.array([0, 7])
    whole = attention.causal_attention(q, k, v, offset, first, window=20)
    monkeypatch.setattr(attention, "SCORE_BUDGET", 1)
    chunks = attention.causal_attention(q, k, v, offset, first, window=20)
    np.testing.assert_allclose(chunks[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(chunks[1, 7:], whole[1, 7:], atol=1e-6)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("T", [40, 100])
def test_whole_sequences_in_blocks_equal_one_block(T: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays(2, T, T)
    first = jnp.array([0, 9])
    whole = attention.causal_attention(q, k, v, jnp.zeros(2, jnp.int32), first, window)
    for block, most in ((16, 100), (48, 100), (16, 2)):
        monkeypatch.setattr(attention, "BLOCK", block)
        monkeypatch.setattr(attention, "MAX_BLOCKS", most)
        blocks = attention.self_attention(q, k, v, first, window)
        np.testing.assert_allclose(blocks[0], whole[0], atol=1e-6)
        np.testing.assert_allclose(blocks[1, 9:], whole[1, 9:], atol=1e-6)


@pytest.mark.parametrize("first", [None, (0, 9)])
@pytest.mark.parametrize("window", [None, 19])
@pytest.mark.parametrize("T, S", [(20, 64), (50, 96), (40, 60), (40, 53)])
def test_a_cache_in_blocks_equals_one_block(
    T: int, S: int, window: int | None, first: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = arrays(2, T, S)
    offset, first_valid = jnp.array([3, 10]), None if first is None else jnp.array(first)
    whole = attention.causal_attention(q, k, v, offset, first_valid, window)
    # Read are the right layer's blocks of 16 keys alone, up to the last of whole blocks of 16 queries.
    end = -(-(10 + -(-T // 16) * 16) // 16) * 16
    stacks = [np.stack([np.full_like(x, np.nan), np.where(np.arange(S)[:, None] < end, x, np.nan)]) for x in (k, v)]
    monkeypatch.setattr(attention, "FORWARD_BLOCK", 16)
    blocks = jax.jit(partial(attention.cached_attention, window=window))(q, *stacks, 1, offset, first_valid)
    np.testing.assert_allclose(blocks, whole, atol=1e-6)


def test_a_window_reads_no_earlier_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays(1, 20, 128)
    offset = jnp.array([70])
    whole = attention.causal_attention(q, k, v, offset, None, 8)
    monkeypatch.setattr(attention, "FORWARD_BLOCK", 16)
    k, v = (np.where(np.arange(128)[:, None] < 48, np.nan, x)[None] for x in (k, v))
    np.testing.assert_allclose(attention.cached_attention(q, k, v, 0, offset, None, 8), whole, atol=1e-6)


@pytest.mark.parametrize("window", [None, 17])
def test_long_prompts_in_blocks_equal_one_block(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = arrays(2, 100, 100)
    whole = attention.self_attention(q, k, v, jnp.array([0, 9]), window)
    monkeypatch.setattr(attention, "MAX_BLOCKS", 0)
    monkeypatch.setattr(attention, "FORWARD_BLOCK", 32)
    blocks = attention.self_attention(q, k, v, jnp.array([0, 9]), window, forward=True)
    np.testing.assert_allclose(blocks[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(blocks[1, 9:], whole[1, 9:], atol=1e-6)


def test_bfloat16_in_blocks_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(1, 40, 64))
    offset = jnp.array([24])
    monkeypatch.setattr(attention, "FORWARD_BLOCK", 16)
    blocks = attention.cached_attention(q, k[None], v[None], 0, offset)
    exact = attention.causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)), offset)
    assert blocks.dtype == jnp.bfloat16
    np.testing.assert_allclose(blocks.astype(jnp.float32), exact, atol=1e-6, rtol=2**-8)


def test_one_query_equals_many() -> None:
    q, k, v = arrays(3, 5, 12)
    offset = jnp.array([0, 4, 7])
    many = attention.causal_attention(q, k, v, offset)
    for t in range(5):
        one = attention.causal_attention(q[:, t : t + 1], k, v, offset + t)
        np.testing.assert_allclose(one[:, 0], many[:, t], atol=1e-6)


def test_long_prompts_never_hold_all_scores() -> None:
    def temporaries(rows: int, tokens: int, forward: bool) -> int:
        shapes = ((rows, tokens, 2, 4, 16), *[(rows, 2, tokens, 16)] * 2)
        described = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(partial(attention.self_attention, forward=forward)).lower(*described).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1, 8192, False) < 4 * 8192 * 8192 * 8 / 2
    # Queries, their copy in blocks and the result take 270 MB of it; a block of 512 queries would take 1,100 more.
    assert temporaries(64, 4096, True) < 4 * 4 * attention.SCORE_BUDGET


def test_rows_that_see_nothing_stay_finite() -> None:
    q, k, v = arrays(1, 3, 3)
    got = attention.causal_attention(q, k, v, jnp.zeros(1, jnp.int32), jnp.array([2]))
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got[0, 2], np.broadcast_to(v[0, :, None, 2], (2, 3, 8)), atol=1e-6)


@pytest.mark.parametrize("B", [1, 3])
def test_the_cache_writes_behind_each_rows_length(B: int) -> None:
    cache = KVCache.empty(2, B, 2, 10, 4, jnp.float32)
    rng = np.random.default_rng(0)
    lengths = np.arange(B) * 2 + 1
    cache = KVCache(cache.k, cache.v, jnp.asarray(lengths, jnp.int32))
    k, v = rng.standard_normal((2, B, 3, 2, 4)).astype(np.float32)
    cache = cache.write(1, k, v).advance(3)
    np.testing.assert_array_equal(cache.length, lengths + 3)
    assert not np.any(cache.k[0]) and not np.any(cache.v[0])
    for b, n in enumerate(lengths):
        np.testing.assert_array_equal(cache.k[1, b, :, n : n + 3], k[b].swapaxes(0, 1))
        np.testing.assert_array_equal(cache.v[1, b, :, n : n + 3], v[b].swapaxes(0, 1))
        assert not np.any(cache.k[1, b, :, :n]) and not np.any(cache.k[1, b, :, n + 3 :])


def test_growing_keeps_the_content() -> None:
    cache = KVCache.empty(1, 2, 2, 4, 4, jnp.float32).write(0, jnp.ones((2, 3, 2, 4)), jnp.ones((2, 3, 2, 4)))
    assert cache.grow(4) is cache
    k, v = np.asarray(cache.k), np.asarray(cache.v) + 1
    cache = replace(cache, v=jnp.asarray(v))
    grown = cache.grow(16)
    assert grown.capacity == 16
    for longer, old in ((grown.k, k), (grown.v, v)):
        np.testing.assert_array_equal(longer[:, :, :, :4], old)
        assert not np.any(longer[:, :, :, 4:])
    assert [capacity_for(n) for n in (1, 256, 257, 5000)] == [256, 256, 512, 8192]


def test_growing_never_holds_more_than_five_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache.empty(2, 3, 2, 8, 4, jnp.float32)
    arrays, held, real = [cache.k, cache.v], [], cache_module.lengthen

    def watched(buffer: jax.Array, **settings: int) -> jax.Array:
        arrays.append(real(buffer, **settings))
        held.append(sum(array.nbytes for array in arrays if not array.is_deleted()))
        return arrays[-1]

    monkeypatch.setattr(cache_module, "lengthen", watched)
    grown = cache.grow(16)
    whole = grown.k.nbytes + grown.v.nbytes
    assert [4 * held_then / whole for held_then in held] == [4, 5] and cache.k.is_deleted() and cache.v.is_deleted()


@pytest.mark.parametrize("B", [1, 3])
def test_the_cache_keeps_its_order_on_gpu(B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA on GPU transposes it to suit a product unless told; here, that it is told and that nothing else changes."""

    def written() -> tuple[str, KVCache]:
        cache = KVCache.empty(2, B, 2, 10, 4, jnp.float32)
        new = jnp.arange(B * 24.0).reshape(B, 3, 2, 4)
        write = jax.jit(lambda cache: cache.write(1, new, -new))
        return write.lower(cache).as_text(), write(cache)

    text, want = written()
    monkeypatch.setattr(cache_module, "platform", lambda: "gpu")
    told, got = written()
    assert "LayoutConstraint" not in text and told.count("@LayoutConstraint") == 2
    jax.tree.map(np.testing.assert_array_equal, got, want)
