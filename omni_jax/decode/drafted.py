"""A session that drafts: what `Session` promises, in fewer forwards of the Thinker.

The same tokens come out for the same seed, whatever the drafter, the width and the batch; only the time differs, and
what `row_stats` tells.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import DecoderConfig
from omni_jax.decode import speculative
from omni_jax.decode.drafting import Drafting
from omni_jax.decode.generate import CHUNK, NO_TOKEN
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session
from omni_jax.decode.speculative import SpeculativeState, begin, decode_rounds
from omni_jax.decode.width import WidthChooser
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Graph
from omni_jax.ops.cache import slots_for

# Timed chunks for each width, of which the fastest counts: the first one also compiles.
TIMED_CHUNKS = 3


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
        self.chooser: WidthChooser | None = None
        self.width = drafting.widths[0]
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

    def progress(self, steps: int) -> tuple[int, int]:
        if self.chooser is not None:
            self.width = self.chooser.choose()
        rounds = self._rounds(steps)
        return rounds, rounds * self.drafting.proposer.gives(self.width)

    def _rounds(self, steps: int) -> int:
        return max(1, steps // self.drafting.proposer.gives(self.width))

    def room(self, drawn: int) -> int:
        # A round writes all that it drafts, however little of it may stand.
        written = max(map(self.drafting.proposer.writes, self.drafting.widths))
        return slots_for(self.longest + min(drawn, self.max_new_tokens) + written)

    def begin(self) -> tuple[jax.Array, SpeculativeState]:
        token, state = super().begin()
        assert self.tapped is not None
        mine = np.asarray([self.taps.index(k) for k in self.drafting.proposer.taps], np.int32)
        self._emitted = []
        drafted = begin(
            (self.params, self.drafting.params),
            state,
            self.tapped[mine],
            self.batch.token_ids,
            proposer=self.drafting.proposer,
            graph=self.graph,
            slots=state.cache.slots,
        )
        return token, drafted

    def settle(self, state: SpeculativeState) -> None:
        """Measure what rounds take, if there is a choice of widths."""
        if len(self.drafting.widths) > 1:
            cache = state.decode.cache
            measured, key = self.drafting.measured, (cache.rows, cache.slots)
            if key not in measured:
                measured[key] = {width: self._seconds(state, width) for width in self.drafting.widths}
            self.chooser = WidthChooser(measured[key])

    def grow(self, state: SpeculativeState, slots: int) -> SpeculativeState:
        """The state with caches of at least `slots` slots."""
        if slots <= state.decode.cache.slots:
            return state
        return speculative.grow(state, proposer=self.drafting.proposer, slots=slots)

    def decode(
        self, state: SpeculativeState, steps: int, until: int | None = None
    ) -> tuple[jax.Array, SpeculativeState]:
        """Dispatch rounds that give about `steps` tokens; `until` as in `Session`."""
        return self._run(state, self.stop_ids, self._rounds(steps), until)

    def _run(
        self, state: SpeculativeState, stop_ids: np.ndarray, rounds: int, until: int | None = None
    ) -> tuple[jax.Array, SpeculativeState]:
        return decode_rounds(
            (self.params, self.drafting.params),
            state,
            stop_ids,
            self.values,
            proposer=self.drafting.proposer,
            graph=self.graph,
            plan=self.plan,
            rounds=rounds,
            width=self.width,
            drawn=self.drafting.drawn,
            until=np.int32(state.decode.cache.rows if until is None else until),
        )

    def _seconds(self, state: SpeculativeState, width: int) -> float:
        """What a round of `width` takes behind this prompt: chunks of them are run for nothing."""
        self.width, seconds = width, []
        rounds, never = self._rounds(CHUNK), np.full(self.stop_ids.shape, NO_TOKEN, np.int32)
        for _ in range(TIMED_CHUNKS):
            trial = jax.tree.map(jnp.copy, state)
            rows = trial.decode.rows
            rows = replace(rows, done=jnp.zeros_like(rows.done), remaining=rows.remaining + CHUNK)
            trial = replace(trial, decode=replace(trial.decode, rows=rows))
            jax.block_until_ready(trial)
            start = time.perf_counter()
            np.asarray(self._run(trial, never, rounds)[0])
            seconds.append((time.perf_counter() - start) / rounds)
        return min(seconds)

    def take(self, tokens: jax.Array | np.ndarray) -> list[list[int]]:
        """Book the tokens of a chunk, and what its rounds gave."""
        drawn = np.asarray(tokens)
        new = super().take(drawn.reshape(len(drawn), -1))
        if drawn.ndim == 3:
            emitted = (drawn != NO_TOKEN).sum(axis=2).astype(np.int32)
            self._emitted.append(emitted)
            if self.chooser is not None:
                # The last round of a row that is done may have been cut short.
                whole = [row[row > 0][: -1 if done else None] for row, done in zip(emitted, self.row_done, strict=True)]
                self.chooser.observe(drawn.shape[2], np.concatenate(whole))
        return new
