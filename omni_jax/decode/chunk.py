"""A chunk of decoding: how it is to be decoded, and the tokens that the device is making."""

from dataclasses import dataclass

import jax
import numpy as np


@dataclass(frozen=True)
class ChunkPlan:
    """How a chunk is decoded: in rounds that give at most `max_emitted` tokens each; a plain step is a round of one.

    verify_tokens: the tokens that each round verifies, one more than it drafts; None for plain steps.
    """

    rounds: int
    max_emitted: int = 1
    verify_tokens: int | None = None

    @property
    def most(self) -> int:
        """The most tokens that a row may get."""
        return self.rounds * self.max_emitted


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens that have been dispatched, with all that is needed to read them later.

    tokens: int32 [B, ...], as a program reports them. columns: numbers that report one token, see `text.reported`.
    fewest: tokens that a row gets at least, unless it ends.
    """

    tokens: jax.Array
    plan: ChunkPlan
    columns: int
    fewest: int

    def read(self) -> np.ndarray:
        """Wait for the tokens: int32 [B, R, E, C], R rounds of up to E tokens in C columns each; id -1 where none."""
        tokens = np.asarray(self.tokens)
        return tokens.reshape(len(tokens), -1, self.plan.max_emitted, self.columns)
