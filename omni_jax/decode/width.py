"""How many tokens a round should verify: as many as give the most tokens a second.

Verifying more tokens costs more, on a model of many experts nearly in proportion, for each token brings experts of its
own; and the further a draft lies from the token at hand, the less often it stands. So the best width follows from two
things: what a round of each width takes, which is measured once, and how often drafts stand, which is counted as they
come and forgotten slowly, because replies change their tone.
"""

from collections.abc import Mapping

import numpy as np

# Widths that are compiled and measured: 1 is a round without a draft.
WIDTHS = (1, 2, 4, 8, 16)
# What is believed of the first draft before any was seen: it counts as so many that stood so often. Hopeful, so that
# wide rounds are tried.
FIRST_DRAFTS, FIRST_STOOD = 4.0, 0.8
# How many drafts the one before it counts for, in what is believed of a draft.
NEIGHBOUR = 4.0
# What of the past is left after a round, and rounds without a draft after which one is drafted to see.
MEMORY, REST = 0.98, 24


class WidthChooser:
    """Chooses the width of the next rounds of one conversation, or of a batch of them.

    seconds: what a round of each width takes.
    """

    def __init__(self, seconds: Mapping[int, float]):
        self.seconds = dict(sorted(seconds.items()))
        self.tried = np.zeros(max(self.seconds) - 1)
        self.stood = np.zeros(max(self.seconds) - 1)
        self.tried[:1], self.stood[:1] = FIRST_DRAFTS, FIRST_DRAFTS * FIRST_STOOD
        self.rested = 0

    def choose(self) -> int:
        """The width that promises the most tokens a second, or now and then a draft where none seems worth it."""
        best = max(self.seconds, key=lambda width: self.expected(width) / self.seconds[width])
        if best == 1 and self.rested >= REST:
            return min((width for width in self.seconds if width > 1), default=1)
        return best

    def expected(self, width: int) -> float:
        """Tokens that a round of `width` gives on average: one of the target's own, and the drafts that stand."""
        tokens = survival = 1.0
        believed = FIRST_STOOD
        for tried, stood in zip(self.tried[: width - 1], self.stood[: width - 1], strict=True):
            # A draft of which little is known stands about as often as the one before it.
            weight = NEIGHBOUR if tokens > 1.0 else 0.1
            believed = (stood + weight * believed) / (tried + weight)
            survival *= believed
            tokens += survival
        return tokens

    def observe(self, width: int, emitted: np.ndarray) -> None:
        """Count rounds of `width` that gave `emitted` int [n] tokens each (none that a stop or a limit cut short).

        A round of e tokens had e - 1 drafts that stood, and one more was tried unless these were all.
        """
        index = np.arange(len(self.tried))
        self.rested = self.rested + len(emitted) if width == 1 else 0
        for tokens in emitted:
            self.tried = MEMORY * self.tried + (index < min(tokens, width - 1))
            self.stood = MEMORY * self.stood + (index < tokens - 1)
