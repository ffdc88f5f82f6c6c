"""A session that drafts: what `Session` promises, in fewer forwards of the Thinker.

The same tokens come out for the same seed, whatever the drafter, the width and the batch; only the time differs, and
what `statistics` tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from omni_jax.config import DecoderConfig
from omni_jax.decode import speculative
from omni_jax.decode.generate import NO_TOKEN
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session
from omni_jax.decode.speculative import Proposer, SpeculativeState, begin, decode_rounds
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Graph
from omni_jax.ops.cache import slots_for


@dataclass(frozen=True)
class Drafting:
    """How to draft: a proposer, its parameters, and how many tokens a round verifies (the one at hand included)."""

    proposer: Proposer
    params: Any
    width: int


class DraftedSession(Session):
    """Generates as `Session` does; `emitted` then holds the tokens of every round, int32 [B, rounds]."""

    def __init__(
        self,
        params: dict,
        graph: Graph,
        text: DecoderConfig,
        batch: Batch,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int | Sequence[int],
        stop_ids: Sequence[int],
        taps: tuple[int, ...],
        drafting: Drafting,
    ):
        """As in `Session`. taps: hidden states that others want, beside those that the drafter reads."""
        wanted = tuple(dict.fromkeys((*taps, *drafting.proposer.taps)))
        super().__init__(params, graph, text, batch, sampling, max_new_tokens, seed, stop_ids, wanted)
        self.drafting = drafting
        self._emitted: list[np.ndarray] = []

    @property
    def emitted(self) -> np.ndarray:
        """Tokens that each round gave each row, int32 [B, rounds]; 0 for rows that were done."""
        return np.concatenate([np.zeros((len(self.rows), 0), np.int32), *self._emitted], axis=1)

    def row_stats(self, row: int) -> dict[str, float]:
        """Rounds, and tokens a round: each holds one token of the target's own beside the drafts that stood."""
        emitted = self.emitted[row]
        rounds = int((emitted > 0).sum())
        return {"rounds": rounds, "tokens_per_round": float(emitted.sum() / max(rounds, 1))}

    def _progress(self, steps: int) -> tuple[int, int]:
        rounds = self._rounds(steps)
        return rounds, rounds * self.drafting.width

    def _rounds(self, steps: int) -> int:
        return max(1, steps // self.drafting.width)

    def _slots(self, drawn: int) -> int:
        # A round writes a whole block, however little of it may stand.
        return slots_for(self.longest + min(drawn, self.max_new_tokens) + self.drafting.width)

    def _prefill(self) -> tuple[jax.Array, SpeculativeState]:
        token, state = super()._prefill()
        assert self.tapped is not None
        mine = np.asarray([self.taps.index(k) for k in self.drafting.proposer.taps], np.int32)
        self._emitted = []
        return token, begin(
            (self.params, self.drafting.params),
            state,
            self.tapped[mine],
            self.batch.token_ids,
            proposer=self.drafting.proposer,
            graph=self.graph,
            slots=state.cache.slots,
            width=self.drafting.width,
        )

    def _decode(self, state: SpeculativeState, steps: int, slots: int) -> tuple[jax.Array, SpeculativeState]:
        if slots > state.decode.cache.slots:
            state = speculative.grow(state, proposer=self.drafting.proposer, slots=slots)
        return decode_rounds(
            (self.params, self.drafting.params),
            state,
            self.stop_ids,
            self.values,
            proposer=self.drafting.proposer,
            graph=self.graph,
            plan=self.plan,
            rounds=self._rounds(steps),
            width=self.drafting.width,
        )

    def _take(self, tokens: jax.Array | np.ndarray) -> list[list[int]]:
        drawn = np.asarray(tokens)
        if drawn.ndim == 3:
            self._emitted.append((drawn != NO_TOKEN).sum(axis=2).astype(np.int32))
        return super()._take(drawn.reshape(len(drawn), -1))
