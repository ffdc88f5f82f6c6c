"""A session that drafts: what `Session` promises, in fewer forwards of the Thinker.

The same tokens come out for the same seed, whatever the drafter, the width and the batch; only the time differs, and
what `row_stats` tells.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import DecoderConfig
from omni_jax.decode.draft import loop as speculative
from omni_jax.decode.draft.acceptance import Rounds
from omni_jax.decode.draft.length import DraftLengthTuner
from omni_jax.decode.draft.loop import SpeculativeState, begin, decode_rounds, rounds_of
from omni_jax.decode.draft.plan import Drafting
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session
from omni_jax.decode.stops import StopStrings
from omni_jax.decode.text import CHUNK, NO_TOKEN
from omni_jax.distributed import broadcast_from_first
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Declaration
from omni_jax.ops.cache import capacity_for

# Timed chunks for each width, of which the fastest counts: the first one also compiles.
TIMED_CHUNKS = 3


class DraftedSession(Session):
    """Generates as `Session` does; `rounds_of` then tells what the rounds of a row gave."""

    def __init__(
        self,
        params: dict,
        declaration: Declaration,
        text: DecoderConfig,
        batch: Batch,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int | Sequence[int],
        stop_ids: Sequence[int],
        taps: tuple[int, ...],
        drafting: Drafting,
        stops: StopStrings | None = None,
        copies: int = 1,
    ):
        """As in `Session`. taps: hidden states that others want, beside those that the drafter reads."""
        super().__init__(
            params, declaration, text, batch, sampling, max_new_tokens, seed, stop_ids, taps, stops, copies
        )
        self.drafting, self.wanted = drafting, taps
        self.chooser: DraftLengthTuner | None = None
        self.width, self.rounds = drafting.widths[0], 1
        # By chunk: tokens that each round gave each row int32 [B, rounds], 0 for rows that were done; the most that a
        # round could give, and the tokens that it verified.
        self._chunks: list[tuple[np.ndarray, int, int]] = []

    def rounds_of(self, row: int) -> Rounds:
        """What the rounds of a row gave."""
        parts = [(given[row][given[row] > 0], most) for given, most, _ in self._chunks]
        nothing = np.zeros(0, np.int32)
        given = np.concatenate([nothing, *(part for part, _ in parts)])
        return Rounds(given, np.concatenate([nothing, *(np.full(len(part), most) for part, most in parts)]))

    def row_stats(self, row: int) -> dict[str, Any]:
        """Rounds, tokens that each gave (one of the target's own beside drafts that stood) and could give, and sums."""
        rounds = self.rounds_of(row)
        verified = sum(int((given[row] > 0).sum()) * width for given, _, width in self._chunks)
        return {
            "rounds": len(rounds.given),
            "tokens_per_round": rounds.mean,
            "drafted": verified - len(rounds.given),
            "verified": verified,
            "round_tokens": rounds.given.tolist(),
            "round_most": rounds.most.tolist(),
        }

    def progress(self, steps: int) -> tuple[int, int]:
        gives = self.drafting.proposer.gives
        if self.chooser is None:
            self.rounds = rounds_of(steps, gives(self.width))
        else:
            self.width, self.rounds = self.chooser.choose(steps)
        return self.rounds, self.rounds * gives(self.width)

    def room(self, drawn: int) -> int:
        # A round writes all that it drafts, however little of it may stand.
        written = max(map(self.drafting.proposer.writes, self.drafting.widths))
        return capacity_for(self.longest + min(drawn, self.max_new_tokens) + written)

    def begin(self) -> tuple[jax.Array, SpeculativeState]:
        mine = self.drafting.proposer.taps
        self.taps = order = tuple(dict.fromkeys((*self.wanted, *mine)))
        token, state = super().begin()
        assert self.tapped is not None
        tapped, self.taps = self.tapped, self.wanted
        # The wanted ones come first; nobody else reads the drafter's.
        self.tapped = tapped[: len(self.wanted)] if self.wanted else None
        self._chunks = []
        drafted = begin(
            (self.params, self.drafting.params),
            state,
            tapped[np.asarray([order.index(k) for k in mine], np.int32)],
            np.repeat(self.batch.token_ids, self.copies, axis=0),
            proposer=self.drafting.proposer,
            declaration=self.declaration,
            capacity=state.cache.capacity,
        )
        return token, drafted

    def settle(self, state: SpeculativeState) -> None:
        """Measure what rounds take, if there is a choice of widths."""
        if len(self.drafting.widths) > 1:
            cache = state.decode.cache
            measured, key = self.drafting.measured, (cache.rows, cache.capacity)
            if key not in measured:
                seconds = {width: self._seconds(state, width) for width in self.drafting.widths}
                mesh = self.declaration.mesh
                # Processes that share a model must choose alike.
                measured[key] = broadcast_from_first(seconds) if mesh is not None and mesh.is_multi_process else seconds
            self.chooser = DraftLengthTuner(measured[key])

    def grow(self, state: SpeculativeState, capacity: int) -> SpeculativeState:
        """The state with caches of at least `capacity` slots."""
        if capacity <= state.decode.cache.capacity:
            return state
        return speculative.grow(state, proposer=self.drafting.proposer, capacity=capacity)

    def decode(
        self, state: SpeculativeState, steps: int, until: int | None = None
    ) -> tuple[jax.Array, SpeculativeState]:
        """Dispatch rounds that give about `steps` tokens; `until` as in `Session`."""
        return self._run(state, self.stop_ids, self.rounds, until)

    def _run(
        self, state: SpeculativeState, stop_ids: np.ndarray, rounds: int, until: int | None = None
    ) -> tuple[jax.Array, SpeculativeState]:
        return decode_rounds(
            (self.params, self.drafting.params),
            state,
            np.int32(rounds),
            stop_ids,
            self.values,
            proposer=self.drafting.proposer,
            declaration=self.declaration,
            plan=self.plan,
            width=self.width,
            drawn=self.drafting.drawn,
            until=np.int32(state.decode.cache.rows if until is None else until),
        )

    def _seconds(self, state: SpeculativeState, width: int) -> float:
        """What a round of `width` takes behind this prompt: chunks of them are run for nothing."""
        self.width, seconds = width, []
        rounds = rounds_of(CHUNK, self.drafting.proposer.gives(width))
        never = np.full(self.stop_ids.shape, NO_TOKEN, np.int32)
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
        ids = drawn if self.plan.likely is None else drawn[..., 0]
        new = super().take(drawn.reshape(len(drawn), -1, *drawn.shape[ids.ndim :]))
        if ids.ndim == 3:
            emitted = (ids != NO_TOKEN).sum(axis=2)
            # Nothing counts that was drawn after a stop string.
            kept = np.asarray([len(row) for row in new])[:, None] - (emitted.cumsum(axis=1) - emitted)
            emitted = np.clip(kept, 0, emitted).astype(np.int32)
            widths, most = self.drafting.widths, ids.shape[2]
            # Only chains have several widths, and they give as many tokens as they verify.
            self._chunks.append((emitted, most, widths[0] if len(widths) == 1 else most))
            if self.chooser is not None:
                # The last round of a row that is done may have been cut short.
                whole = [row[row > 0][: -1 if done else None] for row, done in zip(emitted, self.row_done, strict=True)]
                self.chooser.observe(most, np.concatenate(whole))
        return new
