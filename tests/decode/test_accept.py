"""The acceptance rule emits what the target would have drawn by itself, one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.decode.accept import accept
from omni_jax.decode.generate import NO_TOKEN, Rows
from omni_jax.decode.sampling import Sampling, sample
from omni_jax.decode.session import row_keys

V, B, W = 11, 3, 5


def rows_at(done: np.ndarray, remaining: np.ndarray, seen: np.ndarray) -> Rows:
    return Rows(
        token=jnp.full((B,), 7, jnp.int32),
        done=jnp.asarray(done),
        remaining=jnp.asarray(remaining, jnp.int32),
        seen=jnp.asarray(seen),
        keys=row_keys([1, 2, 3], B),
    )


def one_by_one(
    logits: np.ndarray, drafts: np.ndarray, rows: Rows, length: np.ndarray, stop: set, how: Sampling
) -> list:
    """The rule as a loop over rows and positions: tokens emitted, and whether the row is then done."""
    plan, values, result = how.plan(V), how.values(), []
    for b in range(B):
        done, remaining, seen = bool(rows.done[b]), int(rows.remaining[b]), np.array(rows.seen[b])
        tokens: list[int] = []
        while not done and len(tokens) < W:
            j, seen_now = len(tokens), jnp.asarray(seen)[None]
            at = jnp.asarray([length[b] + 1 + j], jnp.int32)
            token = int(sample(jnp.asarray(logits[b : b + 1, j]), rows.keys[b : b + 1], at, seen_now, values, plan)[0])
            tokens.append(token)
            remaining -= 1
            if plan.penalised:
                seen[token] = True
            done = token in stop or remaining <= 0
            if j == W - 1 or drafts[b, j] != token:
                break
        result.append((tokens, done, remaining, seen))
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    truth=st.floats(0, 1),
    stop=st.sets(st.integers(0, V - 1), max_size=3),
    how=st.sampled_from([Sampling(), Sampling(1.0, top_k=4), Sampling(0.7, repetition_penalty=1.5)]),
)
def test_it_emits_what_one_by_one_would_be_drawn(seed: int, truth: float, stop: set[int], how: Sampling) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((B, W, V)).astype(np.float32) * 3
    penalised = how.repetition_penalty != 1.0
    rows = rows_at(rng.random(B) < 0.2, rng.integers(1, 2 * W, B), rng.random((B, V if penalised else 0)) < 0.2)
    length = rng.integers(1, 100, B).astype(np.int32)
    # Drafts that are right as often as `truth` says: what the target draws when all before was right.
    drafts = rng.integers(0, V, (B, W - 1)).astype(np.int32)
    for j in range(W - 1):
        right = rng.random(B) < truth
        free = one_by_one(logits, drafts, rows, length, set(), how)
        drafts[:, j] = [
            tokens[j] if ok and len(tokens) > j else draft
            for (tokens, *_), ok, draft in zip(free, right, drafts[:, j], strict=True)
        ]
    stop_ids = np.asarray(sorted(stop), np.int32)
    tokens, after = jax.jit(accept, static_argnums=6)(logits, drafts, rows, length, stop_ids, how.values(), how.plan(V))
    for b, (want, done, remaining, seen) in enumerate(one_by_one(logits, drafts, rows, length, stop, how)):
        assert tokens[b].tolist() == want + [NO_TOKEN] * (W - len(want))
        assert bool(after.done[b]) == done and int(after.remaining[b]) == remaining
        np.testing.assert_array_equal(after.seen[b], seen)
        if want and not done:
            assert int(after.token[b]) == want[-1], "the last token is the next one to run"
