"""The acceptance rules emit what the target would have drawn by itself, one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from omni_jax.decode.draft.accept import accept_by_rejection, accept_matching
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.decode.request import row_keys
from omni_jax.decode.sampling import Sampling, filtered, sample
from omni_jax.decode.text import NO_TOKEN, Rows

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
    block = DraftTree.chain(rows.token, jnp.asarray(drafts))
    tokens, _, after = jax.jit(accept_matching, static_argnums=6)(
        logits, block, rows, length, stop_ids, how.values(), how.plan(V)
    )
    for b, (want, done, remaining, seen) in enumerate(one_by_one(logits, drafts, rows, length, stop, how)):
        assert tokens[b].tolist() == want + [NO_TOKEN] * (W - len(want))
        assert bool(after.done[b]) == done and int(after.remaining[b]) == remaining
        np.testing.assert_array_equal(after.seen[b], seen)
        if want and not done:
            assert int(after.token[b]) == want[-1], "the last token is the next one to run"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), how=st.sampled_from([Sampling(), Sampling(1.0, top_k=4)]))
def test_a_tree_is_walked_along_what_would_be_drawn(seed: int, how: Sampling) -> None:
    rng = np.random.default_rng(seed)
    nodes = 12
    logits = rng.standard_normal((B, nodes, V)).astype(np.float32) * 2
    length = rng.integers(1, 100, B).astype(np.int32)
    rows = rows_at(rng.random(B) < 0.2, rng.integers(1, 6, B), np.zeros((B, 0), bool))
    parent, token_ids = np.full((B, nodes), -1), rng.integers(0, V, (B, nodes))
    for b in range(B):
        for n in range(1, nodes):
            parent[b, n] = rng.integers(0, n)
            taken = {int(token_ids[b, m]) for m in range(1, n) if parent[b, m] == parent[b, n]}
            token_ids[b, n] = rng.choice([token for token in range(V) if token not in taken])
    drafts = DraftTree(jnp.asarray(token_ids, jnp.int32), jnp.asarray(parent, jnp.int32), longest=6)
    tokens, path, after = jax.jit(accept_matching, static_argnums=6)(
        logits, drafts, rows, length, np.zeros(0, np.int32), how.values(), how.plan(V)
    )
    for b in range(B):
        node, want, nodes_seen = 0, [], []
        while not rows.done[b] and len(want) < min(int(rows.remaining[b]), 6):
            at = jnp.asarray([length[b] + 1 + len(want)])
            drawn = sample(
                jnp.asarray(logits[b : b + 1, node]), rows.keys[b : b + 1], at, None, how.values(), how.plan(V)
            )
            want.append(int(drawn[0]))
            nodes_seen.append(node)
            behind = [n for n in range(nodes) if parent[b, n] == node and token_ids[b, n] == want[-1]]
            if not behind:
                break
            node = behind[0]
        assert tokens[b].tolist() == want + [NO_TOKEN] * (6 - len(want))
        assert path[b, : len(want)].tolist() == nodes_seen
        assert int(after.remaining[b]) == int(rows.remaining[b]) - len(want)


def test_ancestors_by_hand() -> None:
    parent = jnp.asarray([[-1, 0, 1, 1, 3, 4]])
    seen = DraftTree(jnp.zeros((1, 6), jnp.int32), parent, longest=5).ancestors()[0].astype(int)
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 1, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("how", [Sampling(1.0), Sampling(0.8, top_k=5), Sampling(1.0, top_p=0.8)])
def test_drawn_drafts_leave_the_distribution_of_the_target(how: Sampling) -> None:
    """Many rows of one problem: each emitted token follows the target, whatever the drafts were drawn from."""
    n, rng = 30_000, np.random.default_rng(0)
    p, q = rng.standard_normal((W, V)).astype(np.float32) * 1.5, rng.standard_normal((W - 1, V)).astype(np.float32)
    plan, values = how.plan(V), how.values()
    keys, length = row_keys(list(range(n)), n), jnp.full((n,), 9, jnp.int32)
    rows = Rows(jnp.zeros(n, jnp.int32), jnp.zeros(n, bool), jnp.full(n, 99), jnp.zeros((n, 0), bool), keys)

    @jax.jit
    def rounds(rows: Rows) -> tuple[jax.Array, jax.Array]:
        choose = DraftSampler(keys, length + 1, values, plan)
        chosen, drawn_from = jax.vmap(choose, in_axes=(1, 0), out_axes=1)(
            jnp.broadcast_to(q, (n, W - 1, V)), jnp.arange(W - 1)
        )
        drafts = DraftTree.chain(rows.token, chosen, drawn_from)
        logits = jnp.broadcast_to(p, (n, W, V))
        return accept_by_rejection(logits, drafts, rows, length, jnp.zeros(0, jnp.int32), values, plan)[0], chosen

    tokens, chosen = (np.asarray(x) for x in rounds(rows))
    count = (tokens >= 0).sum(axis=1)
    for i in range(W):
        drawn = tokens[count > i, i]
        kept = np.asarray(jax.nn.softmax(filtered(jnp.asarray(p[i : i + 1]), None, values, plan))[0], np.float64)
        assert set(drawn.tolist()) <= set(np.flatnonzero(kept).tolist())
        seen = np.bincount(drawn, minlength=V)[kept > 0]
        assert chisquare(seen, kept[kept > 0] / kept.sum() * len(drawn)).pvalue > 1e-3
    stood = (tokens[:, :-1] == chosen).cumprod(axis=1).sum(axis=1)
    assert ((count == stood + 1) | (count == W)).all()
    assert 0.2 < (stood > 0).mean() < 0.95
