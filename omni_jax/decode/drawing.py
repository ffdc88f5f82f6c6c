"""How the rows of a state draw and end, side by side, as compiled programs take it.

A program holds only the kind of drawing (`Plan`); the rest are arrays. Requests that all draw as their call says run
the program of that call, which holds no more than they need. Once a request with settings of its own runs among them,
the program is one of a short list, whatever is asked for: what it holds beyond a row's settings leaves that row as it
is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from omni_jax.decode.limits import stop_ids_of
from omni_jax.decode.request import Request
from omni_jax.decode.rows import note_seen
from omni_jax.decode.sampling import Plan, Sampling, values_by_row
from omni_jax.decode.text import NO_TOKEN, reported_shape
from omni_jax.settings import MAX_LOGPROBS

# Candidates of programs for rows with different settings; further programs hold none, and the whole vocabulary.
CANDIDATES = (64, 1024)
# Stop ids of a row grow by this factor from one program to the next.
STOP_IDS = 8


@dataclass(frozen=True, eq=False)
class Drawing:
    """plan: what is static. values: sampling values by name, of all rows, or [B, 1]. stop_ids: int32 [m], or [B, m]."""

    plan: Plan
    values: dict[str, Any]
    stop_ids: np.ndarray

    @cached_property
    def columns(self) -> int:
        """The numbers that report one token, see `text.reported`."""
        return int(np.prod(reported_shape(self.plan), dtype=int))


class Drawings:
    """The drawing of requests beside each other; as their call says, `own`, unless one has settings of its own."""

    def __init__(self, sampling: Sampling, stop_ids: Collection[int], vocab_size: int):
        """sampling, stop_ids: those of the call."""
        self.sampling, self.vocab_size = sampling, vocab_size
        self.own = Drawing(sampling.plan(vocab_size), sampling.values(), stop_ids_of(stop_ids, vocab_size))
        self._stop_ids = set(stop_ids)

    def of_chunk(self, rows: Sequence[Request | None]) -> Drawing:
        """How these rows draw; those without a request draw nothing."""
        requests = [request for request in rows if request is not None]
        if all(request.sampling == self.sampling for request in requests):
            return replace(self.own, stop_ids=self._stop_ids_of(rows))
        plan = shared_plan([request.sampling for request in requests], self.vocab_size)
        samplings = [Sampling() if request is None else request.sampling for request in rows]
        return Drawing(plan, values_by_row(samplings), self._stop_ids_of(rows))

    def of_prompts(self, requests: Sequence[Request]) -> Drawing:
        """How their first tokens are drawn: as in the call, greedily, or by the one program that can draw in any way.

        A prompt draws once, so that a program that holds more costs little; and prompts have many shapes.
        """
        drawing, samplings = self.of_chunk(requests), {request.sampling for request in requests}
        if samplings <= {self.sampling} or samplings == {Sampling()}:
            return drawing
        anyhow = Plan(False, True, self.vocab_size, min(MAX_LOGPROBS, self.vocab_size))
        return replace(drawing, plan=anyhow)

    def fit(self, state: Any, drawing: Drawing) -> Any:
        """A state, with as much noted about its rows as the program of their next draws needs."""
        return note_seen(state, self.vocab_size if drawing.plan.penalised else 0)

    def _stop_ids_of(self, rows: Sequence[Request | None]) -> np.ndarray:
        """The stop ids of rows, int32 [B, m] with one of few m; int32 [m] where all are those of the call."""
        by_row = [self._stop_ids if request is None else set(request.limits.stop_ids) for request in rows]
        if all(ids == self._stop_ids for ids in by_row):
            return self.own.stop_ids
        m = STOP_IDS
        while m < max(map(len, by_row)):
            m *= STOP_IDS
        padded = np.full((len(rows), m), NO_TOKEN, np.int32)
        for row, ids in zip(padded, by_row, strict=True):
            row[: len(ids)] = sorted(ids)
        return padded


def shared_plan(samplings: Sequence[Sampling], vocab_size: int) -> Plan:
    """The static part of drawing for rows of different settings: one of a short list, all of whose draws are theirs."""
    plans = [sampling.plan(vocab_size) for sampling in samplings]
    penalised = any(plan.penalised for plan in plans)
    logprobs = any(plan.top_logprobs is not None for plan in plans)
    top_logprobs = min(MAX_LOGPROBS, vocab_size) if logprobs else None
    candidates = {plan.candidates for plan in plans if not plan.greedy}
    if not candidates:
        return Plan(True, penalised, 0, top_logprobs)
    if candidates == {0}:
        return Plan(False, penalised, 0, top_logprobs, some_greedy=True)
    most = vocab_size if 0 in candidates else max(candidates)
    most = next((size for size in CANDIDATES if size >= most), vocab_size)
    return Plan(False, penalised, min(most, vocab_size), top_logprobs)
