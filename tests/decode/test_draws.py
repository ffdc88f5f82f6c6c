"""Draws that must be independent are: at a temperature that flattens everything, shared noise shows as equal tokens."""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from omni_jax.decode.draft.accept import accept_by_rejection
from omni_jax.decode.draft.plan import proposer_for
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.decode.request import row_keys
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech import voice as speech
from omni_jax.decode.text import NO_TOKEN, Rows
from omni_jax.models.param import bind
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from tests.parity import user

FLAT = 1e3  # a temperature at which all tokens are about as likely


def equal_share(tokens: np.ndarray) -> float:
    """How many pairs of columns of int [rows, n] agree, as a share."""
    pairs = list(combinations(tokens.T, 2))
    return float(np.mean([a == b for a, b in pairs]))


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_each_draft_of_a_round_has_noise_of_its_own(
    kind: str, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drafter = omnis("tiny"), load_drafter(drafters(kind, "tiny"))
    B, width, how = 16, 6, Sampling(temperature=FLAT)
    vocab = omni.config.thinker.text.vocab_size
    proposer = proposer_for(drafter, omni.config.thinker.text.num_layers)

    @partial(jax.jit, static_argnums=0)
    def drafted(proposer: Any, params: tuple[dict, dict], keys: jax.Array) -> jax.Array:
        thinker = bind(omni.declarations["thinker"], params[0])
        memory = proposer.empty(params[1], B, 16, jnp.float32)
        choose = DraftSampler(keys, jnp.full((B,), 3), how.values(), how.plan(vocab))
        token = jnp.full((B,), 5, jnp.int32)
        return proposer.propose(params[1], thinker, memory, token, width, choose)[0].token_ids[:, 1:]

    drafts = np.asarray(drafted(proposer, (omni.params["thinker"], drafter.params), row_keys(list(range(B)), B)))
    assert equal_share(drafts) < 0.1
    assert equal_share(drafts.T) < 0.1, "rows with keys of their own draft alike"


def drawn_first(p: np.ndarray, q: np.ndarray, guess: int, rows: int, how: Sampling, seen: np.ndarray) -> np.ndarray:
    """The first token that `accept_by_rejection` emits in each of `rows` rows, for a draft `guess` drawn from q."""
    V = len(p)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (rows, 2, V))
    guesses = jnp.full((rows, 1), guess, jnp.int32)
    log_probs = jnp.broadcast_to(jnp.log(jnp.asarray(q, jnp.float32)), (rows, 1, V))
    state = Rows(
        token=jnp.zeros((rows,), jnp.int32),
        done=jnp.zeros((rows,), bool),
        remaining=jnp.full((rows,), 9, jnp.int32),
        seen=jnp.broadcast_to(jnp.asarray(seen, bool), (rows, len(seen))),
        keys=row_keys(list(range(rows)), rows),
    )
    drafts = DraftTree.chain(state.token, guesses, log_probs)
    length = jnp.full((rows,), 4, jnp.int32)
    run = jax.jit(accept_by_rejection, static_argnums=6)
    tokens = np.asarray(run(logits, drafts, state, length, np.empty(0, np.int32), how.values(), how.plan(V))[0])
    assert np.all(tokens[:, 0] != NO_TOKEN)
    return tokens[:, 0]


def test_whether_a_draft_is_accepted_says_nothing_of_what_replaces_it() -> None:
    p, q = np.asarray([0.4, 0.2, 0.2, 0.2]), np.asarray([1e-9, 1e-9, 1e-9, 1.0])
    first = drawn_first(p, q, 3, 20_000, Sampling(temperature=1.0), np.empty(0))
    seen = np.bincount(first, minlength=4)
    assert chisquare(seen, p * len(first)).pvalue > 1e-3


def test_drawn_drafts_pay_the_repetition_penalty_too() -> None:
    """Log-probabilities are negative, so the penalty multiplies: log 0.5 = -0.7 becomes -14 for a token seen before."""
    p, q = np.asarray([0.5, 0.25, 0.25]), np.asarray([1.0, 1e-9, 1e-9])
    plain = drawn_first(p, q, 0, 500, Sampling(temperature=1.0), np.empty(0))
    how = Sampling(temperature=1.0, repetition_penalty=20.0)
    penalised = drawn_first(p, q, 0, 500, how, np.asarray([1, 0, 0]))
    assert 200 < np.sum(plain == 0) < 300 and np.sum(penalised == 0) == 0


def test_codes_of_speech_are_drawn_one_by_one(omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "RESIDUAL", Sampling(temperature=FLAT))
    reply = omnis("odd").generate(
        user("Say"), max_new_tokens=4, stop_ids=(), speech=True, speech_temperature=FLAT, speech_top_k=0, max_frames=24
    )
    codes = reply.codes
    assert codes is not None and codes.shape[1] > 12
    assert equal_share(codes[1:].T) < 0.1, "the codes of a frame share their noise"
    assert equal_share(codes.T[:, 1:].T) < 0.1, "a codebook draws alike in every frame"
    assert len(np.unique(codes[0])) > codes.shape[1] / 2, "first codes share their noise over frames"
