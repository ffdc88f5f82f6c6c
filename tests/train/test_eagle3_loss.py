"""EAGLE-3's loss against a statement of it: a chain from one token at a time, drafted as in decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.draft_config import Eagle3Config
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import bind
from omni_jax.ops import branches
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.losses.eagle3 import DECAY, STEPS, eagle3_loss
from omni_jax.train.losses.target import Ends
from omni_jax.weights.drafters import Drafter, load_drafter
from tests.helpers.arrays import close
from tests.helpers.drafts import LENGTH, ends, packed, states

SLOTS = 48


def chains(declaration: Any, params: dict, rows: tuple, embed: jax.Array, steps: int) -> jax.Array:
    """Logits [n, steps, Vd] of n chains, one after the other, as rounds of decoding have them.

    rows: features [n, T, n * D], how many of them go before the chain int32 [n], and the row's tokens int32 [n, T + 1].
    """
    module: Eagle3 = bind(declaration, params)

    def one(row: tuple) -> jax.Array:
        features, held, ids = row
        embedded = module.embed_tokens(ids[None, 1:], embed)
        cache = module.empty(1, SLOTS, jnp.float32)
        outs, cache = module.extend(module.fuse(features[None]), embedded, cache, held[None])
        out, logits = outs[:, held - 1], []
        for j in range(steps):
            logits.append(module.logits(out)[0])
            step, cache = module.extend(out[:, None], embedded[:, held + j][:, None], cache)
            out = step[:, 0]
        return jnp.stack(logits)

    return jax.lax.map(one, rows)


@dataclass
class Stated:
    """A chain from each token: what the target says [n, steps, Vd], its likeliest token and what the drafter knows.

    asked: bool [n, steps], whether a token that is to be learned is drafted.
    """

    drafter: Drafter
    rows: tuple
    target: Ends
    says: np.ndarray
    likeliest: np.ndarray
    known: np.ndarray
    asked: np.ndarray

    @classmethod
    def of(cls, drafter: Drafter, features: Any, last: Any, batch: TextBatch, target: Ends, steps: int) -> "Stated":
        module = drafter.module
        assert isinstance(module, Eagle3)
        known = np.asarray(module.to_target(jnp.arange(module.config.draft_vocab_size)))
        logits, step, rows, found = np.asarray(last) @ np.asarray(target.head).T, np.arange(steps), [], []
        for b, i in np.ndindex(*batch.token_ids.shape):
            first, at, here = batch.first_seen[b, i], *(np.minimum(i + n + step, LENGTH - 1) for n in (2, 1))
            row = np.roll(np.pad(batch.token_ids[b], (0, steps + 1)), -first)
            padded = np.roll(np.pad(features[b], ((0, steps), (0, 0))), -first, axis=0)
            rows.append((padded, np.int32(i - first + 1), row))
            asked = (i + 2 + step < LENGTH) & (batch.first_seen[b, at] == first) & (batch.labels[b, at] != IGNORED)
            restricted = np.exp(logits[b, here][:, known])
            says = restricted / restricted.sum(axis=1, keepdims=True)
            found.append((says, logits[b, here].argmax(axis=1), asked))
        says, likeliest, asked = map(np.stack, zip(*found, strict=True))
        return cls(drafter, tuple(map(np.stack, zip(*rows, strict=True))), target, says, likeliest, known, asked)

    def total(self, params: dict) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The loss; the weight, and whether each draft is the target's likeliest token [n, steps]."""
        steps = self.asked.shape[1]
        logits = chains(self.drafter.declaration, params, self.rows, self.target.embed, steps)
        counted = self.asked & np.isin(self.likeliest, self.known)
        entropy = -jnp.sum(self.says * jax.nn.log_softmax(logits), axis=2)
        right = jnp.asarray(self.known)[jnp.argmax(logits, axis=2)] == self.likeliest
        return jnp.sum(jnp.where(counted, entropy * DECAY ** np.arange(steps), 0)), (counted[:, 0].sum(), right)


def case(variant: str, drafters: Callable[[str, str], Path]) -> tuple:
    drafter = load_drafter(drafters("eagle3", variant))
    config = drafter.config
    assert isinstance(config, Eagle3Config)
    D, V = config.layer.hidden_size, config.layer.vocab_size
    return drafter, states(config.features, D), states(1, D, 5), packed(V), ends(V, D)


def trained(drafter: Drafter) -> dict:
    return {name: value for name, value in drafter.params.items() if name != "d2t"}


@pytest.mark.parametrize("variant", ["tiny", "small", "odd"])
def test_the_loss_equals_the_statement(variant: str, drafters: Callable[[str, str], Path]) -> None:
    """Seven steps, with a part of the vocabulary and all of it, with an embedding of its own and without."""
    drafter, features, last, batch, target = case(variant, drafters)
    one = Stated.of(drafter, features, last, batch, target, STEPS)
    total, (size, right) = jax.jit(one.total)(drafter.params)
    asked, right = one.asked, np.asarray(right)
    run = jax.jit(partial(eagle3_loss, declaration=drafter.declaration))
    loss = run(trained(drafter), features, last, batch, target, drafter.params["d2t"])
    close(loss.total, total)
    assert float(loss.weight) == size > 0
    alive = np.cumprod(asked & right, axis=1).sum(0) / np.maximum(np.cumprod(asked, axis=1).sum(0), 1)
    close(loss.metrics["accepted"] / loss.weight, 1 + alive.sum())
    shares = (asked & right).sum(0) / np.maximum(asked.sum(0), 1)
    got = [loss.metrics[f"accuracy_{j + 1}"] / loss.weight for j in range(STEPS)]
    np.testing.assert_allclose(np.array(got), shares, atol=1e-6)


def test_the_gradient_equals_the_statements(drafters: Callable[[str, str], Path], monkeypatch: Any) -> None:
    """With steps computed anew, and with few logits at once."""
    drafter, features, last, batch, target = case("tiny", drafters)
    d2t, steps = drafter.params["d2t"], 3
    one = Stated.of(drafter, features, last, batch, target, steps)

    def of(loss: Callable[[dict], Any]) -> dict:
        return jax.jit(jax.grad(loss))(trained(drafter))

    want = of(lambda p: one.total({**p, "d2t": d2t})[0])
    for remat, budget in ((False, 1 << 25), (True, 1)):
        monkeypatch.setattr(branches, "SCORE_BUDGET", budget)
        run = partial(eagle3_loss, declaration=drafter.declaration, steps=steps, remat=remat)
        got = of(lambda p, run=run: run(p, features, last, batch, target, d2t).total)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), got, want)
