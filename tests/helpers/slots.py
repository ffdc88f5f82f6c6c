"""Conversations for slots, each with a seed and a limit of its own."""

from collections.abc import Iterator

import numpy as np

from omni_jax.omni import Reply
from tests.parity import audio_part, image_part, user

# Messages, seed, most new tokens.
ASKED = [
    (user("Just words."), 3, 9),
    (user(image_part(90, 90, 5), "One picture, and more words than in the first row."), 1, 41),
    (user(audio_part(1.2, 5), image_part(80, 60, 6), "Both."), 4, 1),
    (user("Words and words again."), 1, 17),
    (user(audio_part(1.1, 2)), 5, 33),
]
TEXTS = [ASKED[0], ASKED[3], (user("And a last one."), 9, 26), (user("Or"), 2, 14), (user("two."), 2, 1)]


def in_order(finished: Iterator[tuple[int, Reply]]) -> list[Reply]:
    by_number = dict(finished)
    return [by_number[i] for i in range(len(by_number))]


def assert_same(ours: Reply, theirs: Reply, spoken: bool) -> None:
    """Two replies have the same tokens and rounds of drafting, and, if they are spoken, the same codes."""
    assert ours.token_ids == theirs.token_ids
    assert ours.stats.get("rounds") == theirs.stats.get("rounds")
    if spoken:
        assert ours.codes is not None and theirs.codes is not None
        np.testing.assert_array_equal(ours.codes, theirs.codes)
