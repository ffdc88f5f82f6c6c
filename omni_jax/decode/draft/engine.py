"""The engine that drafts: the tokens of `PlainEngine`, in fewer forwards of the Thinker.

In float32 the same tokens come for the same seed, whatever the drafter, the number of drafts and the batch. In
bfloat16, near-ties may break differently, since a forward of several tokens rounds otherwise. Drawn drafts keep only
the distribution. How many tokens a round verifies is fixed, or chosen from measured times and from how often drafts
were accepted lately.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decode.chunk import Chunk, ChunkPlan
from omni_jax.decode.draft.acceptance import Rounds
from omni_jax.decode.draft.length import DraftLengthTuner
from omni_jax.decode.draft.loop import SpeculativeState, begin_drafting, decode_rounds, grow, rounds_for
from omni_jax.decode.draft.plan import DraftPlan
from omni_jax.decode.drawing import Drawing
from omni_jax.decode.engine import PlainEngine, Prefilled, most_tokens, record
from omni_jax.decode.prompt import pad_length
from omni_jax.decode.request import Request
from omni_jax.decode.text import CHUNK, NO_TOKEN
from omni_jax.distributed import broadcast_from_first
from omni_jax.inputs.batch import Batch

# Timed chunks for each number of tokens to verify, of which the fastest counts: the first one also compiles.
TIMED_CHUNKS = 3


class SpeculativeEngine:
    """Draws tokens as `target` does, with the drafts of a plan."""

    def __init__(self, target: PlainEngine, drafts: DraftPlan):
        self.target, self.proposer, self.drafter_params = target, drafts.proposer, drafts.params
        self.lengths, self.drawn, self.times = drafts.verify_tokens, drafts.drawn, drafts.times
        self.slots_written = drafts.slots_written
        self.tuner: DraftLengthTuner | None = None

    @property
    def params(self) -> tuple[dict, Any]:
        """The Thinker's parameters and the drafter's, as `decode_rounds` takes them."""
        return self.target.params, self.drafter_params

    def prefill(self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...] = ()) -> Prefilled:
        """As `Engine.prefill`; the drafter reads the prompts too."""
        capacity = self.capacity(most_tokens(requests, CHUNK))
        prefilled = self.target.prefill_for(batch, requests, self._order(taps), capacity)
        return self._begin(prefilled, batch, requests, taps)

    def prefill_in_pieces(
        self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...] = ()
    ) -> Iterator[Prefilled | None]:
        """As `Engine.prefill_in_pieces`; the drafter, which is small, reads all that runs at the end."""
        capacity, beginning = self.capacity(most_tokens(requests, CHUNK)), self.target.beginning(batch, requests, taps)
        for prefilled in self.target.pieces_for(batch, requests, self._order(taps), capacity, beginning):
            if prefilled is None:
                yield None
                continue
            whole = self.target.whole(prefilled, batch, requests, taps, beginning)
            yield replace(self._begin(prefilled, batch, requests, taps), tapped=whole)

    def _order(self, taps: tuple[int, ...]) -> tuple[int, ...]:
        """The numbers of the hidden states that a prefill hands out: the wanted ones first, then those for drafts."""
        return tuple(dict.fromkeys((*taps, *self.proposer.taps)))

    def _begin(
        self, prefilled: Prefilled, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...]
    ) -> Prefilled:
        """What a prefill of the target gives, with the drafter's memory of the prompts."""
        order, tapped = self._order(taps), prefilled.tapped
        assert tapped is not None
        mine = np.asarray([order.index(number) for number in self.proposer.taps], np.int32)
        # Of what the target has run.
        T = tapped.shape[2]
        token_ids = pad_length(batch, max(batch.token_ids.shape[1], prefilled.start + T)).token_ids
        token_ids = token_ids[:, prefilled.start : prefilled.start + T]
        (memory,) = prefilled.kept or (None,)
        state = begin_drafting(
            self.params,
            prefilled.state,
            tapped[mine],
            np.repeat(token_ids, len(requests) // len(token_ids), axis=0),
            np.asarray([request.drafts for request in requests]),
            memory,
            np.int32(prefilled.start),
            proposer=self.proposer,
            declaration=self.target.declaration,
            capacity=prefilled.state.cache.capacity,
        )
        return Prefilled(prefilled.chunk, state, tapped[: len(taps)] if taps else None)

    def keep(self, state: SpeculativeState, b: int, request: Request) -> None:
        """As `Engine.keep`: the cache and the drafter's memory."""
        self.target.keep_row((state.decode.cache, state.memory), b, request)

    def capacity(self, tokens: int) -> int:
        """As `Engine.capacity`: a round writes all that it drafts, even if little of it is accepted."""
        return self.target.capacity(tokens + self.slots_written)

    def grow(self, state: SpeculativeState, capacity: int) -> SpeculativeState:
        """As `Engine.grow`."""
        return grow(state, proposer=self.proposer, capacity=capacity)

    def plan(self, state: SpeculativeState, steps: int) -> ChunkPlan:
        """As `Engine.plan`. If there is a choice of lengths, the first call measures rounds of each on `state`."""
        if len(self.lengths) == 1:
            return self.plan_of(self.lengths[0], steps)
        if self.tuner is None:
            self.tuner = DraftLengthTuner(self._round_seconds(state))
        verify_tokens, rounds = self.tuner.choose(steps)
        return replace(self.plan_of(verify_tokens, steps), rounds=rounds)

    def plan_of(self, verify_tokens: int, steps: int) -> ChunkPlan:
        """A chunk of about `steps` tokens in rounds that verify `verify_tokens` each."""
        max_emitted = self.proposer.max_emitted(verify_tokens)
        return ChunkPlan(rounds_for(steps, max_emitted), max_emitted, verify_tokens)

    def dispatch(
        self, state: SpeculativeState, plan: ChunkPlan, rows: Sequence[Request | None] = (), until: int | None = None
    ) -> tuple[Chunk, SpeculativeState]:
        """As `Engine.dispatch`."""
        drawing = self.target.drawings.of_chunk(rows)
        tokens, state = self._run(self.target.drawings.fit(state, drawing), plan, drawing, until)
        return Chunk(tokens, plan, drawing.columns, fewest=plan.rounds if until is None else 0), state

    def receive(self, chunk: Chunk, rows: Sequence[Request | None]) -> None:
        """As `Engine.receive`; what rounds gave is learned from."""
        gave = {request: rounds for request, rounds in record(chunk, rows).items() if request.drafts}
        if self.tuner is not None and chunk.plan.verify_tokens is not None and gave:
            # The last round of a row that is done may have been cut short.
            whole = [rounds[:-1] if request.done else rounds for request, rounds in gave.items()]
            self.tuner.observe(chunk.plan.max_emitted, np.concatenate(whole))

    def stats(self, request: Request) -> dict[str, Any]:
        """Rounds, tokens that each gave (the target's own and the accepted drafts) and could give, and sums.

        None of these for a request that does not draft.
        """
        if not request.drafts:
            return self.target.stats(request)
        rounds = rounds_of(request)
        return {
            **self.target.stats(request),
            "rounds": len(rounds.given),
            "tokens_per_round": rounds.mean,
            "drafted": request.verified - len(rounds.given),
            "verified": request.verified,
            "round_tokens": rounds.given.tolist(),
            "round_most": rounds.most.tolist(),
        }

    def _run(
        self, state: SpeculativeState, plan: ChunkPlan, drawing: Drawing, until: int | None = None
    ) -> tuple[jax.Array, SpeculativeState]:
        assert plan.verify_tokens is not None
        return decode_rounds(
            self.params,
            state,
            np.int32(plan.rounds),
            drawing.stop_ids,
            drawing.values,
            proposer=self.proposer,
            declaration=self.target.declaration,
            plan=drawing.plan,
            verify_tokens=plan.verify_tokens,
            drawn=self.drawn,
            until=np.int32(state.decode.cache.rows if until is None else until),
        )

    def _round_seconds(self, state: SpeculativeState) -> dict[int, float]:
        """Seconds of a round of each length, for a state of this size: measured once."""
        cache = state.decode.cache
        measured, size = self.times.measured, (cache.rows, cache.capacity)
        if size not in measured:
            seconds = {length: self._seconds(state, length) for length in self.lengths}
            mesh = self.target.declaration.mesh
            # Processes that share a model must choose alike.
            measured[size] = broadcast_from_first(seconds) if mesh is not None and mesh.is_multi_process else seconds
        return measured[size]

    def _seconds(self, state: SpeculativeState, verify_tokens: int) -> float:
        """Seconds of a round after this prompt: chunks of rounds run on copies, and their tokens are dropped.

        All rows draw as the call says, and nothing stops them.
        """
        plan, seconds, drawing = self.plan_of(verify_tokens, CHUNK), [], self.target.drawings.own
        drawing = replace(drawing, stop_ids=np.full_like(drawing.stop_ids, NO_TOKEN))
        state = self.target.drawings.fit(state, drawing)
        for _ in range(TIMED_CHUNKS):
            trial = jax.tree.map(jnp.copy, state)
            rows = trial.decode.rows
            rows = replace(rows, done=jnp.zeros_like(rows.done), remaining=rows.remaining + CHUNK)
            trial = replace(trial, decode=replace(trial.decode, rows=rows))
            jax.block_until_ready(trial)
            start = time.perf_counter()
            np.asarray(self._run(trial, plan, drawing)[0])
            seconds.append((time.perf_counter() - start) / plan.rounds)
        return min(seconds)


def rounds_of(request: Request) -> Rounds:
    """What the rounds of a request gave."""
    return Rounds(np.asarray(request.given, np.int32), np.asarray(request.could_give, np.int32))
