"""DFlash's loss against a statement of it: one anchor at a time, drafted as in decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.draft_config import DFlashConfig
from omni_jax.models.dflash import DFlash
from omni_jax.models.param import bind
from omni_jax.ops import branches
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.losses.dflash import Anchors, decay_of, dflash_loss, draw_anchors
from omni_jax.train.losses.target import Ends, in_chunks
from omni_jax.weights.drafters import Drafter, load_drafter
from tests.helpers.arrays import close
from tests.helpers.drafts import LENGTH, PACKED, ends, packed, states

KEY = jax.random.key(3)
SLOTS = 48


def config_of(drafter: Drafter) -> DFlashConfig:
    assert isinstance(drafter.config, DFlashConfig)
    return drafter.config


def drafted(declaration: Any, params: dict, rows: tuple, target: Ends) -> jax.Array:
    """Log-probabilities [n, W - 1, V] of the drafts of n blocks, one after the other, as rounds of decoding have them.

    rows: features [n, T, n * D], how many of them go before the block int32 [n], and the block int32 [n, W].
    """
    module: DFlash = bind(declaration, params)

    def one(row: tuple) -> jax.Array:
        features, held, ids = row
        cache = module.remember(module.empty(1, SLOTS, jnp.float32), module.fuse(features[None]), held[None])
        hidden, _ = module.draft(target.embed[ids][None], cache)
        return jax.nn.log_softmax(hidden[0, 1:] @ target.head.T)

    return jax.lax.map(one, rows)


@dataclass
class Stated:
    """The blocks of a batch: what is drafted where, the tokens [n, W - 1] that are right, and whether they count."""

    drafter: Drafter
    rows: tuple
    target: Ends
    wanted: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, drafter: Drafter, features: jax.Array, batch: TextBatch, anchors: Anchors, target: Ends) -> "Stated":
        config, rows, right = config_of(drafter), [], []
        ahead = np.arange(1, config.block_size)
        for b, a in zip(*np.nonzero(np.array(anchors.kept)), strict=True):
            anchor = int(anchors.index[b, a])
            first, at = batch.first_seen[b, anchor], np.minimum(anchor + ahead, LENGTH - 1)
            ids = np.full(config.block_size, config.mask_token_id)
            ids[0] = batch.token_ids[b, anchor]
            rows.append((np.roll(features[b], -first, axis=0), np.int32(anchor - first), ids))
            counts = (anchor + ahead < LENGTH) & (batch.first_seen[b, at] == first) & (batch.labels[b, at] != IGNORED)
            right.append((batch.token_ids[b, at], counts))
        wanted, counts = map(np.stack, zip(*right, strict=True))
        return cls(drafter, tuple(map(np.stack, zip(*rows, strict=True))), target, wanted, counts)

    def log_probabilities(self, params: dict) -> tuple[jax.Array, jax.Array]:
        """Of the tokens that are right, [n, W - 1], and whether each is the likeliest."""
        logs = drafted(self.drafter.declaration, params, self.rows, self.target)
        mine = jnp.take_along_axis(logs, jnp.asarray(self.wanted)[..., None], axis=2)[..., 0]
        return mine, jnp.argmax(logs, axis=2) == self.wanted


def case(variant: str, drafters: Callable[[str, str], Path]) -> tuple:
    drafter = load_drafter(drafters("dflash", variant))
    config, batch = config_of(drafter), packed(config_of(drafter).layers.vocab_size)
    D, V = config.layers.hidden_size, config.layers.vocab_size
    return drafter, states(len(config.target_layer_ids), D), batch, draw_anchors(batch, KEY, 9), ends(V, D)


@pytest.mark.parametrize("variant", ["tiny", "small", "odd"])
def test_the_loss_equals_the_statement(variant: str, drafters: Callable[[str, str], Path]) -> None:
    """Blocks of 8, 6 and 16 tokens over full and sliding layers, causal within a block or not, in packed rows."""
    drafter, features, batch, anchors, target = case(variant, drafters)
    one = Stated.of(drafter, features, batch, anchors, target)
    mine, right = map(np.asarray, jax.jit(one.log_probabilities)(drafter.params))
    counted = one.counts
    weights = counted * np.exp(-np.arange(counted.shape[1]) / decay_of(config_of(drafter).block_size))
    run = jax.jit(partial(dflash_loss, declaration=drafter.declaration))
    loss = run(drafter.params, features, batch, anchors, target)
    close(loss.total, -(weights * mine).sum())
    close(loss.weight, weights.sum())
    alive = np.cumprod(counted & right, axis=1).sum(0) / np.maximum(np.cumprod(counted, axis=1).sum(0), 1)
    close(loss.metrics["accepted"] / loss.weight, 1 + alive.sum())
    shares = (counted & right).sum(0) / np.maximum(counted.sum(0), 1)
    got = [loss.metrics[f"accuracy_{k}"] / loss.weight for k in range(1, config_of(drafter).block_size)]
    np.testing.assert_allclose(np.array(got), shares, atol=1e-6)


def test_the_gradient_equals_the_statements(drafters: Callable[[str, str], Path], monkeypatch: Any) -> None:
    """With layers computed anew, and with few logits at once."""
    drafter, features, batch, anchors, target = case("small", drafters)
    anchors = Anchors(anchors.index[:, :3], anchors.kept[:, :3])
    one = Stated.of(drafter, features, batch, anchors, target)
    weights = one.counts * np.exp(-np.arange(one.counts.shape[1]) / decay_of(config_of(drafter).block_size))
    want = jax.jit(jax.grad(lambda p: -jnp.sum(weights * one.log_probabilities(p)[0])))(drafter.params)

    def total(params: dict, remat: bool) -> jax.Array:
        loss = dflash_loss(params, features, batch, anchors, target, declaration=drafter.declaration, remat=remat)
        return loss.total

    for remat, budget in ((False, 1 << 25), (True, 1)):
        monkeypatch.setattr(branches, "SCORE_BUDGET", budget)
        got = jax.jit(jax.grad(partial(total, remat=remat)))(drafter.params)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)


def test_expected_weights_equal_the_statement(drafters: Callable[[str, str], Path]) -> None:
    """D-PACE: each draft weighs as much as is expected to be accepted from it on."""
    drafter, features, batch, anchors, target = case("tiny", drafters)

    one = Stated.of(drafter, features, batch, anchors, target)
    mine = np.asarray(jax.jit(one.log_probabilities)(drafter.params)[0])
    reached = np.cumprod(one.counts * (0.5 * np.exp(mine) + 0.5), axis=1)
    weights = one.counts * np.stack([reached[:, j:].sum(1) for j in range(reached.shape[1])], axis=1)
    run = jax.jit(partial(dflash_loss, declaration=drafter.declaration, expected=0.5))
    loss = run(drafter.params, features, batch, anchors, target)
    close(loss.total, -(weights * mine).sum())
    close(loss.weight, weights.sum())
    # The weights are no way to a lower loss.
    anew = jax.jit(jax.grad(lambda p: run(p, features, batch, anchors, target).weight))(drafter.params)
    assert not any(jnp.any(g) for g in jax.tree.leaves(anew))


def test_decays_are_the_published_ones() -> None:
    assert [decay_of(n) for n in (4, 8, 10, 16, 32)] == [2.0, 4.0, 5.0, 7.0, 7.0]


def test_anchors_are_drawn_without_replacement() -> None:
    batch = packed(50)
    valid = [
        {t for t in range(LENGTH - 1) if min(row[t : t + 2]) != IGNORED and first[t] == first[t + 1]}
        for row, first in zip(np.array(batch.labels), np.array(batch.first_seen), strict=True)
    ]
    assert len(valid[0]) == sum(tokens - learned - 1 for tokens, learned in PACKED[0])
    some, others = (draw_anchors(batch, jax.random.key(seed), 6) for seed in (0, 1))
    for anchors in (some, others):
        for row, chosen in zip(anchors.index.tolist(), valid, strict=True):
            assert sorted(set(row)) == row and len(row) == 6 and set(row) <= chosen
    assert some.kept.all() and some.index.tolist() != others.index.tolist()
    assert some.index.tolist() == draw_anchors(batch, jax.random.key(0), 6).index.tolist()
    every = draw_anchors(batch, KEY, 512)
    found = [
        {t for t, kept in zip(*row, strict=True) if kept}
        for row in zip(every.index.tolist(), every.kept.tolist(), strict=True)
    ]
    assert found == valid


def test_a_token_is_an_anchor_as_often_as_any_other() -> None:
    batch = packed(50)
    keys = jax.random.split(KEY, 3000)
    drawn = jax.jit(jax.vmap(lambda key: draw_anchors(batch, key, 1).index[0, 0]))(keys)
    counts = np.bincount(np.array(drawn), minlength=LENGTH)
    expected = 3000 / np.count_nonzero(counts)
    assert np.all(np.abs(counts[counts > 0] - expected) < 5 * expected**0.5)


@pytest.mark.parametrize("size, parts", [(1, (10, 1)), (4, (3, 4)), (9, (2, 5)), (10, (1, 10)), (1 << 20, (1, 10))])
def test_columns_in_parts_are_as_together(size: int, parts: tuple[int, int]) -> None:
    """As few parts as can be, of about the same size, never larger than the rows themselves; each with all rows."""
    x, seen = jnp.arange(1.0, 61.0).reshape(2, 10, 3), set()

    def some(part: jax.Array) -> jax.Array:
        seen.add(part.shape[1])
        return jnp.sum(jnp.log(part + 1), axis=2)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(in_chunks(some, x, 2 * size) ** 2)

    np.testing.assert_allclose(in_chunks(some, x, 2 * size), some(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(x), jax.grad(lambda x: jnp.sum(some(x) ** 2))(x), rtol=1e-5)
    scans = [e.outvars[0].aval.shape for e in jax.make_jaxpr(total)(x).eqns if e.primitive.name == "scan"]
    ((count, _, columns),) = scans
    assert (count, columns) == parts and seen == {columns, 10}
