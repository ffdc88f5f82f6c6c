"""Drafts that are drawn, not chosen: another reply, from the distribution of plain decoding."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from tests.parity import user

ROWS, TOP, NEW = 300, 3, 3


@pytest.fixture(scope="module")
def chances(omnis: Callable[[str], Omni]) -> dict[tuple[int, ...], float]:
    """How likely each possible reply of NEW tokens is, from the logits of whole sequences."""
    omni = omnis("small")
    (prompt,) = omni.prepare([user("Say")]).token_ids
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NEW):
        prefixes = list(known)
        batch = omni.prepare([user("Say")] * len(prefixes))
        token_ids = np.stack([[*prompt, *prefix] for prefix in prefixes]).astype(np.int32)
        T, B = token_ids.shape[1], len(prefixes)
        longer = {
            "token_ids": token_ids,
            "mask": np.ones((B, T), bool),
            "position_ids": np.broadcast_to(np.arange(T, dtype=np.float32), (3, B, T)),
            "visual_index": np.full((B, T), -1, np.int32),
            "audio_index": np.full((B, T), -1, np.int32),
        }
        logits = np.asarray(omni.logits(type(batch)(**{**vars(batch), **longer})))[:, -1].astype(np.float64)
        best = np.argsort(-logits, axis=1)[:, :TOP]
        weights = np.exp(np.take_along_axis(logits, best, axis=1) - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        known = {
            (*prefixes[i], int(best[i, j])): known[prefixes[i]] * weights[i, j]
            for i, j in product(range(B), range(TOP))
        }
    return known


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_replies_follow_the_distribution_of_the_model(
    kind: str, chances: dict, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drafter = omnis("small"), load_drafter(drafters(kind, "small"))
    settings = {"max_new_tokens": NEW, "stop_ids": (), "temperature": 1.0, "top_k": TOP, "seed": list(range(ROWS))}
    asked = [user("Say")] * ROWS
    drawn = omni.generate(asked, drafter=drafter, draft_tokens=2, draft_sampling=True, **settings)
    replies = [tuple(reply.token_ids) for reply in drawn]
    assert set(replies) <= set(chances)
    # Rare replies are counted together, as the test wants five of each kind at least.
    common = [reply for reply, chance in chances.items() if chance * ROWS >= 5]
    seen = np.asarray([replies.count(reply) for reply in common])
    expected = np.asarray([chances[reply] for reply in common]) * ROWS
    seen, expected = (np.append(x, ROWS - x.sum()) for x in (seen, expected))
    assert len(common) > 4 and chisquare(seen, expected).pvalue > 1e-3


def test_a_seed_gives_one_reply_alone_and_in_a_batch(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drafter = omnis("small"), load_drafter(drafters("dflash", "small"))
    settings = {"max_new_tokens": 20, "stop_ids": (), "temperature": 1.0, "drafter": drafter, "draft_sampling": True}
    asked = [user("Say"), user("Say another thing")]
    both = omni.generate(asked, seed=[5, 6], **settings)
    alone = omni.generate(asked[1], seed=6, **settings)
    assert alone.token_ids == both[1].token_ids != both[0].token_ids
    greedy = {**settings, "temperature": 0.0}
    plain = omni.generate(asked[1], max_new_tokens=20, stop_ids=())
    assert omni.generate(asked[1], **greedy).token_ids == plain.token_ids, "without a temperature nothing is drawn"
