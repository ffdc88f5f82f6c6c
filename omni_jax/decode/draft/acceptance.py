"""What drafting gave: how many tokens per round, and how often the drafts of each position were accepted.

A round of e tokens had e - 1 accepted drafts and one token of the target's own, which counts too. The first token of
a reply comes from the prompt and from no round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Resamples of the replies for an interval, and the percentiles that bound it.
RESAMPLES, INTERVAL = 2000, (2.5, 97.5)


@dataclass(frozen=True)
class Rounds:
    """The rounds of one reply, in order: given int [n], tokens that each gave, and most int [n], what it could give."""

    given: np.ndarray
    most: np.ndarray

    @property
    def whole(self) -> "Rounds":
        """Those that nothing but the target cut short: all but the last, which a stop or a limit may have ended."""
        return Rounds(self.given[:-1], self.most[:-1])

    @property
    def mean(self) -> float:
        """Tokens per round; 0 without a round."""
        return float(self.given.sum() / max(len(self.given), 1))


def mean_accepted(replies: Sequence[Rounds]) -> float:
    """Tokens per round over all rounds of all replies."""
    return float(sum(r.given.sum() for r in replies) / max(sum(len(r.given) for r in replies), 1))


def mean_accepted_per_reply(replies: Sequence[Rounds]) -> float:
    """The mean over replies of each one's tokens per round; replies without a round do not count."""
    means = [r.mean for r in replies if len(r.given)]
    return float(np.mean(means)) if means else 0.0


def acceptance_curve(replies: Sequence[Rounds], positions: int | None = None) -> np.ndarray:
    """How often the first i drafts of a round were all accepted, float [positions] for i = 1, 2, ...

    positions: by default all that were drafted. Of the whole rounds that drafted at least i tokens; NaN where there are
    none. It never rises where all rounds drafted the same number.
    """
    if positions is None:
        positions = max((int(r.most.max()) for r in replies if len(r.most)), default=1) - 1
    given, most = (np.concatenate([getattr(r.whole, name) for r in replies] or [[]]) for name in ("given", "most"))
    index = np.arange(1, positions + 1)
    tried = (most[:, None] > index).sum(axis=0)
    accepted = ((given[:, None] > index) & (most[:, None] > index)).sum(axis=0)
    return np.divide(accepted, tried, out=np.full(positions, np.nan), where=tried > 0)


def conditional(survived: np.ndarray) -> np.ndarray:
    """How often draft i was accepted where all before it were, float [positions], from `acceptance_curve`; NaN if none.

    survived: float [positions].
    """
    before = np.concatenate([[1.0], survived[:-1]])
    return np.divide(survived, before, out=np.full(len(survived), np.nan), where=before > 0)


def interval(
    replies: Sequence[Rounds], statistic: Callable[[Sequence[Rounds]], float | np.ndarray], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % bootstrap interval of a statistic over replies: its lower and upper bounds [...], of its shape.

    Replies are resampled, not rounds, because the rounds of one reply resemble each other.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(replies), (RESAMPLES, len(replies)))
    values = np.stack([np.asarray(statistic([replies[i] for i in chosen])) for chosen in drawn])
    low, high = np.nanpercentile(values, INTERVAL, axis=0)
    return low, high
