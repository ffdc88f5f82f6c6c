"""What is told of drafting, against counts by hand."""

from functools import partial

import numpy as np
import pytest

from omni_jax.decode.draft.acceptance import (
    Rounds,
    acceptance_curve,
    conditional,
    interval,
    mean_accepted,
    mean_accepted_per_reply,
)


def rounds(given: list[int], most: int = 4) -> Rounds:
    return Rounds(np.asarray(given), np.full(len(given), most))


def test_counts_by_hand() -> None:
    replies = [rounds([4, 2, 1, 4, 3]), rounds([1, 1]), rounds([])]
    assert mean_accepted(replies) == pytest.approx(16 / 7)
    assert mean_accepted_per_reply(replies) == pytest.approx((14 / 5 + 1) / 2)
    # The last round of each reply does not count: left are 4, 2, 1, 4 and 1.
    assert acceptance_curve(replies).tolist() == pytest.approx([3 / 5, 2 / 5, 2 / 5])
    assert conditional(acceptance_curve(replies)).tolist() == pytest.approx([3 / 5, 2 / 3, 1])
    assert conditional(np.asarray([0.0, 0.0]))[0] == 0.0 and np.isnan(conditional(np.asarray([0.0, 0.0]))[1])


def test_narrow_rounds_say_nothing_of_later_drafts() -> None:
    mixed = Rounds(np.asarray([2, 4, 1, 2, 1]), np.asarray([2, 4, 1, 4, 4]))
    assert acceptance_curve([mixed]).tolist() == pytest.approx([3 / 3, 1 / 2, 1 / 2])
    assert acceptance_curve([rounds([1])]).size == 3 and np.isnan(acceptance_curve([rounds([1])])).all()


def test_an_interval_has_a_place_for_every_position() -> None:
    low, high = interval([rounds([4, 2]), rounds([2, 1], 2)], partial(acceptance_curve, positions=3))
    assert low.shape == high.shape == (3,) and (low[:1] <= high[:1]).all()


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), 0
    for trial in range(40):
        # Replies differ among themselves, so intervals over rounds would be far too narrow.
        replies = [
            rounds((1 + (rng.random((60, 1)) < p).astype(int)).ravel().tolist(), 2) for p in rng.uniform(0.2, 0.8, 30)
        ]
        low, high = interval(replies, mean_accepted, seed=trial)
        held += low <= 1.5 <= high
        assert high - low > 0.08
    assert 34 <= held <= 40
