"""How many tokens a round should verify: the number that gives the most tokens per second.

Verifying more tokens costs more, on a model of many experts nearly in proportion, because each token brings experts of
its own; and the further a draft is from the current token, the less often it is accepted. So the best number follows
from two things: what a round of each length takes, which is measured once, and how often drafts are accepted, which is
counted as they come and forgotten slowly, because acceptance drifts within a reply.
"""

from collections.abc import Mapping

import numpy as np

# Numbers of tokens to verify that are compiled and measured: 1 is a round without a draft.
LENGTHS = (1, 2, 4, 8, 16)
# Prior for the first draft: pseudo-observations, and the share of them that were accepted. Optimistic, so that long
# drafts are tried.
FIRST_DRAFTS, FIRST_ACCEPTED = 4.0, 0.8
# Pseudo-observations that the estimate of a draft takes from the draft before it; the first has none before it.
NEIGHBOUR, NOTHING = 4.0, 0.1
# The weight of older observations shrinks by this factor with each round.
MEMORY = 0.98
# Rounds without a draft after which some are drafted as a trial, and the share of their time that this may take.
REST, TRIAL_SHARE = 24, 0.05


class DraftLengthTuner:
    """Chooses how many tokens the next rounds verify, for one conversation or a batch of them."""

    def __init__(self, seconds: Mapping[int, float]):
        """seconds: of a round, for each number of tokens to verify."""
        self.seconds = dict(sorted(seconds.items()))
        self.tried = np.zeros(max(self.seconds) - 1)
        self.accepted = np.zeros(max(self.seconds) - 1)
        self.tried[:1], self.accepted[:1] = FIRST_DRAFTS, FIRST_DRAFTS * FIRST_ACCEPTED
        self.rested = 0

    def choose(self, steps: int) -> tuple[int, int]:
        """The number of tokens to verify that promises the most tokens per second, and its rounds for `steps` steps.

        Where no draft seems worth it, one is tried now and then, for a number of rounds that costs little.
        """
        best = max(self.seconds, key=lambda length: self.expected(length) / self.seconds[length])
        rounds = max(1, steps // best)
        if best == 1 and self.rested >= REST:
            best = min(length for length in self.seconds if length > 1)
            plain = self.seconds[1]
            affordable = TRIAL_SHARE * self.rested * plain / max(self.seconds[best] - plain, 1e-3 * plain)
            rounds = min(max(1, int(affordable)), max(1, steps // best))
        self.rested = self.rested + rounds if best == 1 else 0
        return best, rounds

    def expected(self, verify_tokens: int) -> float:
        """Tokens that a round gives on average: one of the target's own, and the drafts that are accepted."""
        tokens = survival = 1.0
        believed = FIRST_ACCEPTED
        counts = zip(self.tried[: verify_tokens - 1], self.accepted[: verify_tokens - 1], strict=True)
        for i, (tried, accepted) in enumerate(counts):
            # A draft of which little is known is accepted about as often as the one before it.
            weight = NEIGHBOUR if i else NOTHING
            believed = (accepted + weight * believed) / (tried + weight)
            survival *= believed
            tokens += survival
        return tokens

    def observe(self, verify_tokens: int, emitted: np.ndarray) -> None:
        """Count rounds that verified `verify_tokens` and gave `emitted` int [n] tokens each, none of them cut short.

        A round of e tokens had e - 1 drafts that were accepted, and one more was tried unless these were all.
        """
        index = np.arange(len(self.tried))
        for tokens in emitted:
            self.tried = MEMORY * self.tried + (index < min(tokens, verify_tokens - 1))
            self.accepted = MEMORY * self.accepted + (index < tokens - 1)
