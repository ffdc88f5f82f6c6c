"""The largest numbers, found by blocks, are those that sorting finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import omni_jax.ops.top_k
from omni_jax.decode.sampling import Sampling, sample
from omni_jax.ops.top_k import by_blocks, top_k


@pytest.mark.parametrize("size", [5, 32, 33, 500, 4111])
@pytest.mark.parametrize("distinct", [3, 10_000], ids=["ties", "few ties"])
def test_blocks_give_what_sorting_gives(size: int, distinct: int) -> None:
    draw = np.random.default_rng(size)
    x = jnp.asarray(draw.integers(0, distinct, (3, size)), jnp.float32)
    x = x.at[:, size // 2 :].set(-jnp.inf).at[2].set(-jnp.inf)
    count = min(size, 16)
    for ours, want in zip(
        jax.jit(by_blocks, static_argnums=(1, 2))(x, count, 32), jax.lax.top_k(x, count), strict=True
    ):
        np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_k=50), Sampling(temperature=0.7, top_p=0.9)])
def test_a_gpu_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch, sampling: Sampling) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9000)), jnp.float32)
    keys, plan = jax.random.split(jax.random.key(0), 4), sampling.plan(9000)

    def drawn() -> np.ndarray:
        return np.asarray(sample(logits, keys, jnp.arange(4), None, sampling.values(), plan))

    want = drawn()
    monkeypatch.setattr(omni_jax.ops.top_k, "platform", lambda: "gpu")
    np.testing.assert_array_equal(drawn(), want)


def test_only_gpus_work_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(size: int, count: int) -> int:
        return str(jax.make_jaxpr(lambda x: top_k(x, count))(jnp.zeros((1, size)))).count(" top_k[")

    assert rounds(20_000, 64) == 1
    monkeypatch.setattr(omni_jax.ops.top_k, "platform", lambda: "gpu")
    assert rounds(20_000, 64) == 2 and rounds(20_000, 2000) == 1 and rounds(3072, 64) == 1
