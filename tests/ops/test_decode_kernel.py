"""One token's attention by the kernel, interpreted on CPU, against the plain operations."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.models import decoder
from omni_jax.models.param import declare
from omni_jax.models.thinker import Thinker
from omni_jax.ops import decode_kernel
from omni_jax.ops.cache import KVCache
from omni_jax.ops.decode_kernel import Norms, OneToken, fits, fused, plain, shares_of
from scripts.gpu import correct
from tests.helpers.arrays import close

L, K, H, S = 3, 2, 32, 512
LAYER = 1


def inputs(dtype: str, G: int, lengths: list[int], norms: bool = True) -> tuple[tuple, KVCache, Norms | None]:
    """Heads and their rotation, a cache that is full of numbers, and norms whose weights are far from one."""
    rng, B = np.random.default_rng(G), len(lengths)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    angle = rng.uniform(0, 6, (B, 1, H))
    rope = jnp.asarray(np.cos(angle), dtype), jnp.asarray(np.sin(angle), dtype)
    cache = KVCache(normal(L, B, K, S, H), normal(L, B, K, S, H), jnp.asarray(lengths, jnp.int32))
    return (normal(B, K, G + 2, H), rope), cache, Norms(normal(L, H), normal(L, H), 1e-6) if norms else None


def both(given: tuple, cache: KVCache, norms: Norms | None, token: OneToken, **how: Any) -> tuple[tuple, tuple]:
    """What the kernel gives, and what the plain operations give; the layer is not known when they are compiled."""
    heads, rope = given

    def run(function: Any, heads: jax.Array, l: jax.Array, token: OneToken) -> Any:
        return jax.jit(lambda heads, cache, l: function(heads, rope, cache, l, norms, token))(heads, cache, l)

    kernel = run(partial(fused, interpret=True, **how), heads, jnp.int32(LAYER), token)
    return kernel, run(plain, heads, jnp.int32(LAYER), token)


def check(kernel: tuple, expected: tuple, before: KVCache) -> None:
    (out, cache), (want, after) = kernel, expected
    bound = 1e-5 if out.dtype == jnp.float32 else 2e-2
    assert out.dtype == want.dtype and np.isfinite(np.asarray(out, np.float32)).all()
    close(out.astype(jnp.float32), want.astype(jnp.float32), bound)
    for got, wanted, old in ((cache.k, after.k, before.k), (cache.v, after.v, before.v)):
        written = np.zeros(old.shape, bool)
        for b, length in enumerate(np.asarray(before.length)):
            written[LAYER, b, :, length] = True
        got, wanted, old = (np.asarray(x, np.float32) for x in (got, wanted, old))
        np.testing.assert_array_equal(got[~written], old[~written])
        np.testing.assert_allclose(got[written], wanted[written], atol=bound * np.abs(wanted[written]).max())
        assert (got[written] != old[written]).mean() > 0.9


@pytest.mark.parametrize(
    "dtype,G,norms",
    [
        ("float32", 1, True),
        ("float32", 2, False),
        ("float32", 8, True),
        ("bfloat16", 1, False),
        ("bfloat16", 2, True),
        ("bfloat16", 8, True),
    ],
)
def test_equals_the_plain_operations(dtype: str, G: int, norms: bool) -> None:
    given, cache, weights = inputs(dtype, G, [0, 63, 64, 511], norms)
    check(*both(given, cache, weights, OneToken(), shares=4), cache)


@pytest.mark.parametrize("window,shares", [(None, 1), (1, 8), (50, 1), (50, 8), (1000, 8)])
def test_windows_and_first_slots(window: int | None, shares: int) -> None:
    given, cache, norms = inputs("float32", 8, [7, 200, 450])
    token = OneToken(jnp.asarray([7, 3, 130], jnp.int32), window)
    check(*both(given, cache, norms, token, shares=shares), cache)


def test_heads_that_are_not_rounded_yet() -> None:
    (heads, rope), cache, norms = inputs("bfloat16", 2, [3, 300])
    check(*both((heads.astype(jnp.float32) * 1.001, rope), cache, norms, OneToken()), cache)


def test_an_offset_that_a_program_adds() -> None:
    (heads, rope), cache, norms = inputs("float32", 2, [30, 5])
    kernel = fused(heads, rope, cache, LAYER, norms, OneToken(offset=1), interpret=True)
    check(kernel, plain(heads, rope, cache, LAYER, norms, OneToken()), cache)


def test_a_cache_of_few_slots() -> None:
    """That of the code predictor."""
    given, cache, norms = inputs("float32", 2, [15, 2])
    cache = replace(cache, k=cache.k[:, :, :, :16], v=cache.v[:, :, :, :16])
    check(*both(given, cache, norms, OneToken()), cache)


def test_a_full_row_keeps_what_it_has() -> None:
    (heads, rope), cache, norms = inputs("float32", 2, [S, 5])
    out, after = fused(heads, rope, cache, LAYER, norms, OneToken(), interpret=True)
    np.testing.assert_array_equal(after.k[:, 0], cache.k[:, 0])
    assert np.isfinite(out).all()


@pytest.mark.parametrize("shares", [1, 4])
def test_a_chunk_of_decoding_gives_the_same_tokens(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = correct.small_thinker()
    prompts = np.random.default_rng(4).integers(0, config.text.vocab_size, (2, 40)).astype(np.int32)
    plainly = declare(Thinker, config)
    params, cpu, calls = correct.random_params(plainly), jax.devices("cpu")[0], []
    want = correct.greedy(params, plainly, prompts, cpu)

    def kernel(*args: Any) -> Any:
        calls.append(args[-1].offset)
        return fused(*args, interpret=True, shares=shares)

    monkeypatch.setattr(decoder, "chosen", lambda x, *_: x.shape[1] == 1)
    monkeypatch.setattr(decoder, "fused", kernel)
    monkeypatch.setattr(decoder, "layers_at_once", lambda layers: layers)
    np.testing.assert_array_equal(correct.greedy(params, declare(Thinker, config), prompts, cpu), want)
    assert calls == [0, 1]


def test_when_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache, _ = inputs("bfloat16", 2, [1])
    x = jnp.zeros((1, 1, 8), jnp.bfloat16)
    monkeypatch.setattr(decode_kernel, "platform", lambda: "gpu")
    monkeypatch.setattr(decode_kernel, "is_hopper", lambda: True)
    monkeypatch.setattr(decode_kernel, "agrees", lambda dtype, head_dim, device: (dtype, head_dim) != ("bfloat16", H))
    monkeypatch.delenv(decode_kernel.SWITCH, raising=False)
    assert not decode_kernel.chosen(x, cache, H, None)
    monkeypatch.setenv(decode_kernel.SWITCH, "on")
    assert decode_kernel.chosen(x, cache, H, None)
    monkeypatch.setattr(decode_kernel, "agrees", lambda *asked: True)
    monkeypatch.setenv(decode_kernel.SWITCH, "off")
    assert not decode_kernel.chosen(x, cache, H, None)
    monkeypatch.setenv(decode_kernel.SWITCH, "auto")
    assert decode_kernel.chosen(x, cache, H, None)
    assert not decode_kernel.chosen(x.repeat(2, axis=1), cache, H, None)
    monkeypatch.setattr(decode_kernel, "is_hopper", lambda: False)
    assert not decode_kernel.chosen(x, cache, H, None)
    monkeypatch.setenv(decode_kernel.SWITCH, "yes")
    with pytest.raises(InputError, match='OMNI_JAX_DECODE_KERNEL="yes" is neither auto nor on nor off'):
        decode_kernel.chosen(x, cache, H, None)


def wrong(asked: tuple, found: tuple) -> tuple[jax.Array, KVCache]:
    return found[0].at[-1, 0, 0, 0].add(0.05), found[1]


def not_kept(asked: tuple, found: tuple) -> tuple[jax.Array, KVCache]:
    return found[0], replace(found[1], v=found[1].v.at[1, 2].set(0))


def no_number(asked: tuple, found: tuple) -> tuple[jax.Array, KVCache]:
    return found[0].at[2, 1, 7, 3].set(jnp.nan), found[1]


def one_slot_too_many(asked: tuple, found: tuple) -> tuple[jax.Array, KVCache]:
    *arrays, token = asked
    return fused(*arrays, replace(token, first_valid=token.first_valid - jnp.array([0, 1, 0])), interpret=True)


def failed(asked: tuple, found: tuple) -> tuple[jax.Array, KVCache]:
    raise NotImplementedError("no such instruction\nat a place")


def failed_silently(asked: tuple, found: tuple) -> tuple[jax.Array, KVCache]:
    raise NotImplementedError


@pytest.mark.parametrize(
    "spoil, slots, why",
    [
        (None, 0, None),
        *[(spoil, 1024, "differs .* by up to") for spoil in (wrong, not_kept, no_number, one_slot_too_many)],
        (wrong, 16, "differs .* by up to"),
        (failed, 16, r"be compiled or run here \(no such instruction\)"),
        (failed_silently, 1024, r"be compiled or run here \(NotImplementedError\)"),
    ],
)
def test_a_gpu_uses_it_if_it_agrees_there(
    spoil: Any, slots: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(*asked: Any, interpret: bool, shares: int) -> Any:
        found = fused(*asked, interpret=True, shares=shares)
        # Of long rows, only what is divided is spoiled.
        return spoil(asked, found) if asked[2].capacity == slots and (shares > 1 or slots == 16) else found

    differences = decode_kernel.differences
    monkeypatch.setattr(decode_kernel, "fused", kernel)
    monkeypatch.setattr(decode_kernel, "differences", lambda dtype, head_dim, device: differences(dtype, head_dim))
    decode_kernel.agrees.cache_clear()
    gpu = Mock(platform="gpu")

    @jax.jit
    def asking_while_it_is_traced(x: jax.Array) -> jax.Array:
        return x + decode_kernel.agrees("bfloat16", H, gpu)

    with nullcontext() if why is None else pytest.warns(UserWarning, match=why):
        assert asking_while_it_is_traced(jnp.zeros(())) == (why is None)


def test_a_program_for_another_machine_is_not_compared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_kernel, "differences", lambda *asked: pytest.fail("compared"))
    assert decode_kernel.agrees("bfloat16", H, jax.devices()[0])


def test_what_it_is_made_for() -> None:
    _, cache, _ = inputs("bfloat16", 2, [1])
    assert fits(jnp.bfloat16, cache, H, None) and fits(jnp.bfloat16, cache, H, jnp.zeros(1, jnp.int32))
    assert not fits(jnp.float32, cache, H, None)
    assert not fits(jnp.bfloat16, cache, 48, None)
    assert not fits(jnp.bfloat16, cache, H, jnp.zeros((1, 1), jnp.int32))
    assert not fits(jnp.bfloat16, replace(cache, k=cache.k[:, :, :, :100]), H, None)


def test_shares_keep_a_device_busy_and_have_a_block_each() -> None:
    assert shares_of(1, 8, 16) == shares_of(1, 4, 256) == 1
    assert (shares_of(1, 4, 2048), shares_of(1, 4, 32768), shares_of(32, 4, 4096)) == (32, 128, 4)
    assert shares_of(6, 4, 4096) == 16 and shares_of(500, 4, 4096) == 1
