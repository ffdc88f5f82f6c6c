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
# How many drafts the one before it counts for, in what is believed of a draft; the first has none before it.
NEIGHBOUR, NOTHING = 4.0, 0.1
# What of the past is left after a round.
MEMORY = 0.98
# Rounds without a draft after which some are drafted to see, and the share of their time that this may take.
REST, TRIAL_SHARE = 24, 0.05


class DraftLengthTuner:
    """Chooses the width of the next rounds of one conversation, or of a batch of them.

    seconds: what a round of each width takes.
    """

    def __init__(self, seconds: Mapping[int, float]):
        self.seconds = dict(sorted(seconds.items()))
        self.tried = np.zeros(max(self.seconds) - 1)
        self.stood = np.zeros(max(self.seconds) - 1)
        self.tried[:1], self.stood[:1] = FIRST_DRAFTS, FIRST_DRAFTS * FIRST_STOOD
        self.rested = 0

    def choose(self, steps: int) -> tuple[int, int]:
        """The width that promises the most tokens a second, and how many rounds of it make `steps` steps.

        Where no draft seems worth it, one is tried now and then, for as many rounds as cost little.
        """
        best = max(self.seconds, key=lambda width: self.expected(width) / self.seconds[width])
        rounds = max(1, steps // best)
        if best == 1 and self.rested >= REST:
            best = min(width for width in self.seconds if width > 1)
            plain = self.seconds[1]
            affordable = TRIAL_SHARE * self.rested * plain / max(self.seconds[best] - plain, 1e-3 * plain)
            rounds = min(max(1, int(affordable)), max(1, steps // best))
        self.rested = self.rested + rounds if best == 1 else 0
        return best, rounds

    def expected(self, width: int) -> float:
        """Tokens that a round of `width` gives on average: one of the target's own, and the drafts that stand."""
        tokens = survival = 1.0
        believed = FIRST_STOOD
        for i, (tried, stood) in enumerate(zip(self.tried[: width - 1], self.stood[: width - 1], strict=True)):
            # A draft of which little is known stands about as often as the one before it.
            weight = NEIGHBOUR if i else NOTHING
            believed = (stood + weight * believed) / (tried + weight)
            survival *= believed
            tokens += survival
        return tokens

    def observe(self, width: int, emitted: np.ndarray) -> None:
        """Count rounds of `width` that gave `emitted` int [n] tokens each (none that a stop or a limit cut short).

        A round of e tokens had e - 1 drafts that stood, and one more was tried unless these were all.
        """
        index = np.arange(len(self.tried))
        for tokens in emitted:
            self.tried = MEMORY * self.tried + (index < min(tokens, width - 1))
            self.stood = MEMORY * self.stood + (index < tokens - 1)
