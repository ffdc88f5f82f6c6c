"""Draws that must not share their noise: of a block's drafts, of acceptance and replacement, of a frame's codes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2_contingency

from omni_jax.decode import frames
from omni_jax.decode.accept import accept_drawn
from omni_jax.decode.drafting import Draftings
from omni_jax.decode.drafts import Chooser, Drafts
from omni_jax.decode.frames import SpeechState
from omni_jax.decode.generate import Rows
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import row_keys
from omni_jax.drafter import load_drafter
from omni_jax.omni import Omni
from omni_jax.ops.cache import KVCache

N, V = 4000, 6


def independent(one: Any, other: Any) -> bool:
    """Whether two columns of draws [N] from V tokens look unrelated."""
    counts = np.zeros((V, V))
    np.add.at(counts, (np.asarray(one), np.asarray(other)), 1)
    used = counts[counts.any(axis=1)][:, counts.any(axis=0)]
    return min(used.shape) > 1 and chi2_contingency(used).pvalue > 1e-4


def rows_of(seen: np.ndarray | None = None) -> Rows:
    nothing = jnp.zeros((N, 0), bool) if seen is None else jnp.broadcast_to(jnp.asarray(seen), (N, V))
    zeros = jnp.zeros(N, jnp.int32)
    return Rows(zeros, jnp.zeros(N, bool), jnp.full(N, 99), nothing, row_keys(list(range(N)), N))


def emitted(how: Sampling, p: np.ndarray, q: np.ndarray, guesses: np.ndarray, rows: Rows) -> np.ndarray:
    """Tokens int32 [N, W] of rounds in which the target's p [W, V] verify drafts [W - 1] drawn from q [W - 1, V]."""
    W = len(p)
    with np.errstate(divide="ignore"):
        logits, drawn_from = (jnp.broadcast_to(np.log(x).astype(np.float32), (N, *x.shape)) for x in (p, q))
    drafts = Drafts.chain(rows.token, jnp.broadcast_to(jnp.asarray(guesses, jnp.int32), (N, W - 1)), drawn_from)
    stop_ids, length = jnp.zeros(0, jnp.int32), jnp.full(N, 9, jnp.int32)
    return np.asarray(accept_drawn(logits, drafts, rows, length, stop_ids, how.values(), how.plan(V))[0])


def test_what_replaces_a_draft_knows_nothing_of_its_fall() -> None:
    p, q = np.array([[0.25, 0.5, 0.25, 0, 0, 0]] * 2), np.array([[0, 1.0, 0, 0, 0, 0]])
    tokens = emitted(Sampling(1.0), p, q, np.array([1]), rows_of())[:, 0]
    assert 0.45 < (tokens == 1).mean() < 0.55
    fallen = tokens[tokens != 1]
    assert set(fallen.tolist()) == {0, 2} and 0.45 < (fallen == 0).mean() < 0.55


def test_the_penalty_is_on_drawn_drafts_too() -> None:
    uniform = np.full((3, V), 1 / V)
    how = Sampling(1.0, repetition_penalty=1000.0)
    # Unnormalised logits above 0 are divided, below 0 multiplied: log(1/V) is below.
    for guesses, longest in (([2, 3], 1), ([4, 2], 2), ([4, 4], 2), ([4, 3], 3)):
        tokens = emitted(how, uniform, uniform[:2], np.array(guesses), rows_of(np.arange(V) == 2))
        drawn = [row[row >= 0].tolist() for row in tokens]
        assert not any(2 in row for row in drawn), "a token of the prompt"
        assert all(len(set(row)) == len(row) for row in drawn), "nor one of the round itself"
        assert max(map(len, drawn)) == longest


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_drafts_of_a_round_are_drawn_each_for_itself(
    kind: str, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni = omnis("tiny")
    drafting = Draftings(omni.config).settle(load_drafter(drafters(kind, "tiny")), 5, None, True)
    assert drafting is not None
    proposer, how, B = drafting.proposer, Sampling(1e6), 4
    memory = proposer.empty(drafting.params, B, 256, np.float32)
    keys, at = row_keys([1, 2, 3, 4], B), jnp.full(B, 3, jnp.int32)
    choose = Chooser(keys, at, how.values(), how.plan(omni.config.thinker.text.vocab_size))
    drafts, _ = proposer.propose(drafting.params, omni.thinker, memory, jnp.zeros(B, jnp.int32), 6, choose)
    # At this temperature all tokens are alike: equal noise would give equal tokens.
    assert len(set(np.asarray(drafts.token_ids[:, 1:]).ravel().tolist())) > 15


class Uniform:
    """Talker and code predictor at once, without any opinion."""

    config = SimpleNamespace(
        num_layers=1, num_kv_heads=1, head_dim=1, num_code_groups=3, codec_eos_id=-1,
        text=SimpleNamespace(vocab_size=V + frames.CODEC_MARKS),
    )  # fmt: skip
    embed = np.zeros((2, V, 1))

    def extend(self, x: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return x, cache

    def logits(self, hidden: jax.Array, i: Any = None) -> jax.Array:
        return jnp.zeros((len(hidden), V if i is not None else V + frames.CODEC_MARKS))

    def embed_code(self, code: jax.Array, i: Any) -> jax.Array:
        return jnp.zeros((len(code), 1))


def spoken(number: int) -> SpeechState:
    keys, zeros = row_keys(list(range(N)), N), jnp.zeros(N, jnp.int32)
    cache = KVCache.empty(1, N, 1, 4, 1, np.float32)
    seen = jnp.zeros((N, 0), bool)
    return SpeechState(
        cache, jnp.zeros((N, 1)), zeros, jnp.int32(number), zeros, jnp.zeros(N, bool), zeros + 9, seen, keys
    )


def test_codes_of_a_frame_and_of_frames_are_drawn_each_for_itself() -> None:
    how, codes = Sampling(1.0), []
    model: Any = Uniform()
    for number in (0, 1):
        state = frames._draw(model, spoken(number), how.values(), how.plan(V + frames.CODEC_MARKS))
        frame, _ = frames._frame(model, jnp.zeros((N, 1)), state, how.values(), how.plan(V))
        codes += list(np.asarray(frame).T)
    assert all((np.bincount(column, minlength=V) > N / V / 2).all() for column in codes)
    for i, one in enumerate(codes):
        for other in codes[i + 1 :]:
            assert independent(one, other)
    assert not independent(codes[0], codes[0])
