"""Engines: how prompts are run and how tokens are drawn, a chunk at a time, for all rows of a state.

An engine knows the device and no schedule; `batching` knows the schedule and no device. `PlainEngine` draws a token per
step; `draft.engine.SpeculativeEngine` drafts several and verifies them in one forward. Both give the same tokens, with
the exceptions that it names.

    prepared batch -> prefill -> first tokens, state -> (plan, grow, dispatch) -> Chunk, state -> receive -> Requests
                                                   ^------------------------------------'

Shapes that reach the compiler are bucketed: prompts to a few lengths, caches to powers of two that grow with replies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np

from omni_jax.config import DecoderConfig
from omni_jax.decode.chunk import Chunk, ChunkPlan
from omni_jax.decode.drawing import Drawings
from omni_jax.decode.keeping import Beginning, Keeper, Store, contents_of
from omni_jax.decode.media import encode_media
from omni_jax.decode.pieces import Tapped, media_of, pieces_of
from omni_jax.decode.prompt import pad_length, prompt_lengths
from omni_jax.decode.request import Request, row_keys
from omni_jax.decode.rows import rewind, take
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.text import (
    CHUNK,
    DecodeState,
    Held,
    PrefillInput,
    decode_chunk,
    empty_cache,
    grow,
    prefill,
    read_piece,
)
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Media
from omni_jax.ops.cache import capacity_for
from omni_jax.sharding import place_rows


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Prompts that have run: the first token of every row, the state to go on from, and hidden states.

    tapped: the prompts' hidden states of the n numbers that were wanted, [n, B, T, D], T bucketed; None without any.
    start: tokens of a prompt that were kept and did not run. kept: what else was kept of them, see `Engine.keep`.
    """

    chunk: Chunk
    state: Any
    tapped: jax.Array | None
    start: int = 0
    kept: tuple = ()


class Engine(Protocol):
    """What draws the tokens of requests that share a state, one row each."""

    def prefill(self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...] = ()) -> Prefilled:
        """Run the prompts of `batch`, B rows, for n requests each: B * n rows of a state, those of a prompt together.

        taps: numbers of hidden states to hand out.
        """
        ...

    def prefill_in_pieces(
        self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...] = ()
    ) -> Iterator[Prefilled | None]:
        """As `prefill`, at each step a bounded number of tokens if the engine has a bound: None until the last.

        What an engine has kept of a prompt does not run again.
        """
        ...

    def keep(self, state: Any, b: int, request: Request) -> None:
        """Keep row `b` of the state, whose request is complete, for prompts that go on from it, if the engine can."""
        ...

    def capacity(self, tokens: int) -> int:
        """The size of a cache in which a row may come to hold `tokens` tokens."""
        ...

    def grow(self, state: Any, capacity: int) -> Any:
        """The state with caches of at least `capacity` positions; the argument must not be used afterwards."""
        ...

    def plan(self, state: Any, steps: int) -> ChunkPlan:
        """How to decode the next chunk of about `steps` (at most CHUNK) tokens."""
        ...

    def dispatch(
        self, state: Any, plan: ChunkPlan, rows: Sequence[Request | None] = (), until: int | None = None
    ) -> tuple[Chunk, Any]:
        """Start a chunk: what will have its tokens, and the state after it; the argument must not be used afterwards.

        rows: the request of each row that draws; by default all draw as the call says. until: the number of done rows
        at which it ends early, by default all.
        """
        ...

    def receive(self, chunk: Chunk, rows: Sequence[Request | None]) -> None:
        """Wait for a chunk and hand each row's tokens to its request; rows without one are passed over."""
        ...

    def stats(self, request: Request) -> dict[str, Any]:
        """What there is to report about how a request was drawn."""
        ...


class PlainEngine:
    """Draws one token per row and step."""

    def __init__(
        self,
        params: dict,
        declaration: Declaration,
        text: DecoderConfig,
        sampling: Sampling,
        stop_ids: Sequence[int] = (),
        piece: int | None = None,
        store: Store | None = None,
    ):
        """params, declaration and text: the Thinker's. sampling, stop_ids: of requests that have none of their own.

        piece: the most tokens that `prefill_in_pieces` runs at once; None for whole prompts. store: where it keeps
        media and conversations, for engines of this model that draft alike; None if it keeps nothing.
        """
        self.params, self.declaration, self.piece = params, declaration, piece
        self.keeper = None if store is None else Keeper(store)
        self.drawings = Drawings(sampling, stop_ids, text.vocab_size)

    def prefill(self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...] = ()) -> Prefilled:
        """As `Engine.prefill`, with room for a first chunk."""
        return self.prefill_for(batch, requests, taps, self.capacity(most_tokens(requests, CHUNK)))

    def prefill_for(self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...], capacity: int) -> Prefilled:
        """As `prefill`, into caches of at least `capacity` positions."""
        batch = pad_length(batch, bucket(batch.token_ids.shape[1]))
        capacity = max(capacity_for(batch.token_ids.shape[1]), capacity)
        return self._draw_first(batch, self._encode(batch), requests, taps, capacity)

    def prefill_in_pieces(
        self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...] = ()
    ) -> Iterator[Prefilled | None]:
        """As `Engine.prefill_in_pieces`; a prompt of one piece, of which nothing is kept, runs as in `prefill`."""
        capacity, beginning = self.capacity(most_tokens(requests, CHUNK)), self.beginning(batch, requests, taps)
        for prefilled in self.pieces_for(batch, requests, taps, capacity, beginning):
            yield prefilled and replace(prefilled, tapped=self.whole(prefilled, batch, requests, taps, beginning))

    def beginning(self, batch: Batch, requests: Sequence[Request], taps: tuple[int, ...]) -> Beginning | None:
        """What is kept of a prompt whose hidden states of these numbers are wanted, if anything is."""
        if self.keeper is None or len(batch.mask) > 1:
            return None
        return self.keeper.begin(
            requests[0], contents_of(batch, self._merge_size), float(batch.rope_delta[0]), bool(taps)
        )

    @cached_property
    def _merge_size(self) -> int:
        """Of the vision encoder; read once, because the host takes a while to bind a module."""
        return bind(self.declaration, self.params).config.vision.spatial_merge_size

    def whole(
        self,
        prefilled: Prefilled,
        batch: Batch,
        requests: Sequence[Request],
        taps: tuple[int, ...],
        beginning: Beginning | None,
    ) -> jax.Array | None:
        """The wanted hidden states of a prompt, which come first in what has run, with those that were kept."""
        states = None if prefilled.tapped is None or not taps else prefilled.tapped[: len(taps)]
        if beginning is not None and states is not None:
            both = Tapped(max(batch.token_ids.shape[1], beginning.tokens + states.shape[2]))
            if beginning.conversation.hidden is not None:
                both.put(beginning.conversation.hidden, 0)
            both.put(states, beginning.tokens)
            states = both.states
        if self.keeper is not None and len(batch.mask) == 1:
            self.keeper.note_hidden(requests[0], states)
        return states

    def pieces_for(
        self,
        batch: Batch,
        requests: Sequence[Request],
        taps: tuple[int, ...],
        capacity: int,
        beginning: Beginning | None,
    ) -> Iterator[Prefilled | None]:
        """As `prefill_in_pieces`, into caches of at least `capacity` positions; hidden states of what runs only."""
        tokens, start = batch.token_ids.shape[1], 0 if beginning is None else beginning.tokens
        if len(batch.mask) > 1 or start == 0 and tokens <= (self.piece or tokens):
            yield self.prefill_for(batch, requests, taps, capacity)
            return
        *others, last = pieces_of(start, tokens, self.piece)
        has_media = (batch.visual_index[:, start:] >= 0).any() or (batch.audio_index[:, start:] >= 0).any()
        media, mesh = self._encode(batch) if has_media else None, self.declaration.mesh
        if media is not None and others:
            yield None
        capacity, tapped = max(capacity_for(last.stop), capacity), Tapped(last.stop - start)
        if beginning is None:
            cache, *kept = (empty_cache(self.params, declaration=self.declaration, capacity=capacity),)
        else:
            cache, *kept = rewind(beginning.conversation.state, np.int32(start), capacity=capacity)
        for piece in others:
            part = piece.of(batch)
            cache, states = read_piece(
                self.params,
                *piece.placed(part, mesh),
                media_of(media, part, mesh),
                cache,
                declaration=self.declaration,
                taps=taps,
            )
            tapped.put(states, piece.start - start)
            yield None
        part, held = last.of(batch), Held(cache, self._seen(batch.token_ids[:, : last.start], requests))
        prefilled = self._draw_first(part, media_of(media, part, mesh), requests, taps, cache.capacity, held)
        if prefilled.tapped is not None:
            tapped.put(prefilled.tapped, last.start - start)
        yield replace(prefilled, tapped=tapped.states, start=start, kept=tuple(kept))

    def _encode(self, batch: Batch) -> Media | None:
        store = None if self.keeper is None else self.keeper.store
        return encode_media(self.params, batch, self.declaration, store)

    def keep(self, state: DecodeState, b: int, request: Request) -> None:
        """As `Engine.keep`: the cache."""
        self.keep_row((state.cache,), b, request)

    def keep_row(self, state: tuple, b: int, request: Request) -> None:
        """Keep row `b` of a cache and of what else belongs to it, if anything is kept."""
        if self.keeper is not None:
            self.keeper.end(request, lambda tokens: take(state, np.int32(b), capacity=capacity_for(tokens)))

    def _seen(self, token_ids: np.ndarray, requests: Sequence[Request]) -> Any:
        """Which tokens int32 [1, T] holds, bool [1, V], or [1, 0] where these requests need not know."""
        V = self.drawings.vocab_size if self.drawings.of_prompts(requests).plan.penalised else 0
        return place_rows(np.isin(np.arange(V), token_ids)[None], self.declaration.mesh)

    def _draw_first(
        self,
        batch: Batch,
        media: Media | None,
        requests: Sequence[Request],
        taps: tuple[int, ...],
        capacity: int,
        held: Held | None = None,
    ) -> Prefilled:
        """Run prompts, or what is left of them after `held`, padded to a bucket, and draw the first tokens."""
        drawing = self.drawings.of_prompts(requests)
        prompts = PrefillInput(
            token_ids=batch.token_ids,
            length=prompt_lengths(batch),
            position_ids=batch.position_ids,
            rope_delta=batch.rope_delta,
            budget=np.asarray([request.max_new_tokens for request in requests], np.int32),
            keys=row_keys([request.seed for request in requests], len(requests)),
            stop_ids=drawing.stop_ids,
            values=drawing.values,
        ).placed(self.declaration.mesh)
        token, state, tapped = prefill(
            self.params,
            prompts,
            media,
            declaration=self.declaration,
            plan=drawing.plan,
            capacity=capacity,
            taps=taps,
            held=held,
        )
        chunk = Chunk(token, ChunkPlan(rounds=1), drawing.columns, fewest=1)
        return Prefilled(chunk, self.drawings.fit(state, self.drawings.of_chunk(requests)), tapped if taps else None)

    def capacity(self, tokens: int) -> int:
        """As `Engine.capacity`."""
        return capacity_for(tokens)

    def grow(self, state: DecodeState, capacity: int) -> DecodeState:
        """As `Engine.grow`."""
        return grow(state, capacity=capacity)

    def plan(self, state: DecodeState, steps: int) -> ChunkPlan:
        """As `Engine.plan`: `steps` plain steps."""
        return ChunkPlan(rounds=steps)

    def dispatch(
        self, state: DecodeState, plan: ChunkPlan, rows: Sequence[Request | None] = (), until: int | None = None
    ) -> tuple[Chunk, DecodeState]:
        """As `Engine.dispatch`."""
        drawing = self.drawings.of_chunk(rows)
        tokens, state = decode_chunk(
            self.params,
            self.drawings.fit(state, drawing),
            np.int32(plan.rounds),
            drawing.stop_ids,
            drawing.values,
            declaration=self.declaration,
            plan=drawing.plan,
            until=np.int32(state.cache.rows if until is None else until),
        )
        return Chunk(tokens, plan, drawing.columns, fewest=plan.rounds if until is None else 0), state

    def receive(self, chunk: Chunk, rows: Sequence[Request | None]) -> None:
        """As `Engine.receive`."""
        record(chunk, rows)

    def stats(self, request: Request) -> dict[str, Any]:
        """As `Engine.stats`: the tokens of the prompt that were kept, if the engine keeps any."""
        return {} if self.keeper is None else self.keeper.stats(request)


def record(chunk: Chunk, rows: Sequence[Request | None]) -> dict[Request, np.ndarray]:
    """Wait for a chunk and hand each row's tokens to its request: what each of its rounds gave it, int32 [n]."""
    read = zip(rows, chunk.read(), strict=True)
    return {request: request.record(reports, chunk.plan) for request, reports in read if request is not None}


def most_tokens(requests: Sequence[Request], more: int) -> int:
    """The most tokens that a row holds, prompt and reply, once each request has drawn `more` tokens or all it may."""
    return max(request.prompt_tokens + min(more, request.max_new_tokens) for request in requests)
