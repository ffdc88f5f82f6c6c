"""The chosen width against the best fixed one, in a simulation of what rounds cost and how often drafts stand."""

from collections.abc import Callable

import numpy as np
import pytest

from omni_jax.decode.draft.length import LENGTHS, DraftLengthTuner

# Seconds of a round, in units of a plain step: drafts nearly free; 128 experts of which 8 work, for one row and for
# twelve (what their bytes amount to); and a dense model with a costly drafter.
COSTS = {
    "flat": (1.0, 1.05, 1.1, 1.2, 1.4),
    "experts, one row": (1.0, 1.7, 2.57, 4.25, 6.54),
    "experts, twelve rows": (1.0, 1.4, 1.72, 1.79, 1.79),
    "costly drafter": (1.0, 1.4, 1.5, 1.7, 2.1),
}
# How often draft i stands if those before it do, behind t tokens.
ACCEPTANCE: dict[str, Callable[[int, int], float]] = {
    "never": lambda i, t: 0.0,
    "half": lambda i, t: 0.5,
    "often": lambda i, t: 0.8,
    "nearly always": lambda i, t: 0.95,
    "less with distance": lambda i, t: 0.9**i * 0.9,
    "by turns": lambda i, t: 0.9 if t // 300 % 2 else 0.2,
}


def speed(
    width: int | None, cost: tuple[float, ...], stands: Callable[[int, int], float], steps: int, rows: int
) -> float:
    """Tokens per second of replies of 1500 tokens, at a fixed length or at chosen ones, as an engine does it.

    A chunk is chosen before the one ahead of it is read.
    """
    rng, seconds = np.random.default_rng(1), dict(zip(LENGTHS, cost, strict=True))
    chooser, tokens, taken = DraftLengthTuner(seconds), np.zeros(rows, int), 0.0
    ahead: tuple[int, np.ndarray] | None = None
    while tokens.min() < 1500:
        W, rounds = (width, max(1, steps // width)) if width else chooser.choose(steps)
        emitted = np.ones((rounds, rows), int)
        for r, row in np.ndindex(rounds, rows):
            while emitted[r, row] < W and rng.random() < stands(emitted[r, row] - 1, tokens[row]):
                emitted[r, row] += 1
            tokens[row] += emitted[r, row]
        if ahead:
            chooser.observe(*ahead)
        ahead, taken = (W, emitted.ravel()), taken + rounds * seconds[W]
    return tokens.sum() / taken


@pytest.mark.parametrize("steps, rows", [(32, 1), (8, 1), (32, 4), (8, 4)])
@pytest.mark.parametrize("acceptance", ACCEPTANCE)
@pytest.mark.parametrize("cost", COSTS)
def test_it_is_never_a_tenth_slower_than_the_best_fixed_width(
    cost: str, acceptance: str, steps: int, rows: int
) -> None:
    stands = ACCEPTANCE[acceptance]
    best = max(speed(width, COSTS[cost], stands, steps, rows) for width in LENGTHS)
    assert speed(None, COSTS[cost], stands, steps, rows) >= 0.9 * best


def test_what_it_believes_is_what_it_saw() -> None:
    chooser = DraftLengthTuner({1: 1.0, 4: 2.0})
    for _ in range(300):
        chooser.observe(4, np.array([1, 2, 4, 4]))
    # Of four rounds three pass the first draft, two of these the second, and these the third.
    assert chooser.expected(4) == pytest.approx(1 + 3 / 4 + 2 / 4 + 2 / 4, rel=0.05)
    assert chooser.choose(32) == (4, 8)
    for _ in range(300):
        chooser.observe(4, np.array([1]))
    assert chooser.choose(32) == (1, 32)
    assert chooser.choose(32) == (4, 1), "a draft is tried, for as long as one round may cost"
    assert chooser.choose(32) == (1, 32)
