"""One generation as the host sees it: from a prepared batch to token ids, in chunks.

The next chunk is dispatched before the last one is read, so the device does not wait for the host. Shapes that reach
the compiler are bucketed: prompts to a few lengths, caches to powers of two that grow with the reply.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from omni_jax.config import DecoderConfig
from omni_jax.decode.media import encode_media
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.stops import StopStrings
from omni_jax.decode.text import CHUNK, NO_TOKEN, PrefillInput, decode_chunk, grow, prefill, retire
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.values import is_whole, listed, shown, whole
from omni_jax.models.param import Declaration
from omni_jax.ops.cache import capacity_for


class Session:
    """Generates from `batch`; iterate over `chunks`, then read `rows` and the times.

    prefill_seconds and decode_seconds leave out what the caller does between chunks.
    """

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
        taps: tuple[int, ...] = (),
        stops: StopStrings | None = None,
        copies: int = 1,
    ):
        """params, declaration and text: the Thinker's. seed: one for all rows or one each. stop_ids: tokens that end one.

        stops: texts that end one. copies: replies to each prompt, which are rows side by side.
        """
        self.params, self.declaration = params, declaration
        self.lengths = np.repeat(batch.mask.sum(axis=1).astype(np.int32), copies)
        self.longest = int(self.lengths.max())
        self.max_new_tokens = limit_of(max_new_tokens)
        check_context(self.longest, self.max_new_tokens, text.max_position_embeddings)
        self.stop_ids = stop_ids_of(stop_ids, text.vocab_size)
        self.plan, self.values = sampling.plan(text.vocab_size), sampling.values()
        self.logprobs = sampling.logprobs
        self.batch, self.copies = pad_length(batch, bucket(batch.token_ids.shape[1])), copies
        self.keys = row_keys(seed, len(self.lengths))
        self.taps = taps
        self.tapped: jax.Array | None = None
        self.stops = stops if stops and stops.strings else None
        self._start_rows()

    def _start_rows(self) -> None:
        """Forget all that was drawn."""
        self.rows: list[list[int]] = [[] for _ in self.lengths]
        self._reports: list[list[np.ndarray]] = [[] for _ in self.lengths]
        self.watches = [self.stops.watch() for _ in self.lengths] if self.stops else []
        self.prefill_seconds = self.decode_seconds = 0.0

    @property
    def met(self) -> list[str | None]:
        """The stop string that each row has met, if any."""
        return [watch.met for watch in self.watches] or [None] * len(self.rows)

    @property
    def stopped(self) -> list[bool]:
        """Which rows have met a stop id or a stop string."""
        by_id = (bool(ids) and ids[-1] in self.stop_ids for ids in self.rows)
        return [id or text is not None for id, text in zip(by_id, self.met, strict=True)]

    @property
    def row_done(self) -> list[bool]:
        """Which rows have stopped or reached their limit."""
        return [stop or len(ids) >= self.max_new_tokens for stop, ids in zip(self.stopped, self.rows, strict=True)]

    @property
    def done(self) -> bool:
        """Whether every row has stopped or reached its limit."""
        return all(self.row_done)

    @property
    def spoken(self) -> list[list[int]]:
        """The tokens of each row that speech says: all drawn so far but the last of a row that is done.

        With stop strings, those that no stop string can hold any more.
        """
        spoken = [ids[:-1] if done else ids for ids, done in zip(self.rows, self.row_done, strict=True)]
        for row, watch in enumerate(self.watches):
            if watch.met is not None or not self.row_done[row]:
                spoken[row] = self.rows[row][: watch.tokens]
        return spoken

    def reports(self, row: int, since: int = 0) -> np.ndarray:
        """What programs reported of a row's tokens from number `since` on, int32 [n, 2 + 2k], or [n, 1] if only ids.

        See `reported`. Only chunks that are asked for are read.
        """
        parts, missing = [], len(self.rows[row]) - since
        for part in reversed(self._reports[row]):
            parts.append(part)
            missing -= len(part)
            if missing <= 0:
                break
        return np.concatenate(parts[::-1])[-missing:]

    def give_tapped(self, number: int) -> jax.Array:
        """The prompts' hidden states of a number in `taps`, [B, T, D], once they have run; all are forgotten then."""
        assert self.tapped is not None
        tapped, self.tapped = self.tapped[self.taps.index(number)], None
        return tapped

    def row_stats(self, row: int) -> dict[str, Any]:
        """What there is to tell about how a row was drawn."""
        return {}

    def chunks(self, steps: int = CHUNK) -> Iterator[list[list[int]]]:
        """New token ids of every row: first one each, then up to `steps` (at most CHUNK) each, until all are done."""
        self._start_rows()
        start = time.perf_counter()
        tokens, state = self.begin()
        self.settle(state)
        # The fewest and the most tokens of a row that is not done.
        fewest = most = 1
        ahead, first = None, True
        while True:
            if fewest < self.max_new_tokens:
                fewest, most = (n + more for n, more in zip((fewest, most), self.progress(steps), strict=True))
                ahead, state = self.decode(self.grow(state, self.room(most)), steps)
            met, new = self.met, self.take(tokens)
            if first:
                self.prefill_seconds = time.perf_counter() - start
            else:
                self.decode_seconds += time.perf_counter() - start
            yield new
            start = time.perf_counter()
            if self.done or ahead is None:
                return
            for row, (before, now) in enumerate(zip(met, self.met, strict=True)):
                if now != before:
                    # The device knows of stop ids and limits only.
                    state = retire(state, np.int32(row))
            tokens, ahead, first = ahead, None, False

    def progress(self, steps: int) -> tuple[int, int]:
        """The fewest and the most tokens that a chunk of `steps` steps draws."""
        return steps, steps

    def room(self, drawn: int) -> int:
        """The size of a cache in which rows draw `drawn` tokens, or all that they may."""
        return capacity_for(self.longest + min(drawn, self.max_new_tokens))

    def begin(self) -> tuple[jax.Array, Any]:
        """Run the prompts: the first token of every row, int32 [B, 1], and the state to decode from."""
        batch = self.batch
        media = encode_media(self.params, batch, self.declaration)
        request = PrefillInput(
            token_ids=batch.token_ids,
            length=self.lengths[:: self.copies],
            position_ids=batch.position_ids,
            rope_delta=batch.rope_delta,
            budget=np.full(self.lengths.shape, self.max_new_tokens, np.int32),
            keys=self.keys,
            stop_ids=self.stop_ids,
            values=self.values,
        ).placed(self.declaration.mesh)
        capacity = max(capacity_for(batch.token_ids.shape[1]), self.room(CHUNK))
        token, state, self.tapped = prefill(
            self.params, request, media, declaration=self.declaration, plan=self.plan, capacity=capacity, taps=self.taps
        )
        return token[:, None], state

    def settle(self, state: Any) -> None:
        """Find out behind real prompts what must be known before decoding; for plain decoding there is nothing."""

    def grow(self, state: Any, capacity: int) -> Any:
        """The state with a cache of at least `capacity` slots."""
        return grow(state, capacity=capacity) if capacity > state.cache.capacity else state

    def decode(self, state: Any, steps: int, until: int | None = None) -> tuple[jax.Array, Any]:
        """Dispatch a chunk of `steps` steps: its tokens and the state behind it.

        until: how many rows have to be done for an early end, by default all.
        """
        enough = state.cache.rows if until is None else until
        return decode_chunk(
            self.params,
            state,
            np.int32(steps),
            self.stop_ids,
            self.values,
            declaration=self.declaration,
            plan=self.plan,
            until=np.int32(enough),
        )

    def take(self, tokens: jax.Array | np.ndarray) -> list[list[int]]:
        """Book the tokens of a chunk, as programs report them; returns the new ones of every row.

        Tokens drawn after a stop string are dropped.
        """
        chunk, new = np.asarray(tokens), []
        for b, row in enumerate(chunk if self.plan.likely is not None else chunk[..., None]):
            row = row[row[:, 0] != NO_TOKEN]
            if self.watches:
                row = row[: self.watches[b].add(row[:, 0].tolist())]
            self._reports[b].append(row)
            new.append(row[:, 0].tolist())
            self.rows[b] += new[-1]
        return new


def check_context(prompt_tokens: int, max_new_tokens: int, limit: int) -> None:
    """Raise InputError unless a prompt and its reply fit the model's context."""
    if prompt_tokens + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}: together more than the "
            f"model's context of {limit}; shorten the prompt or its media, or ask for at most "
            f"{max(limit - prompt_tokens, 0)}"
        )


def pad_length(batch: Batch, T: int) -> Batch:
    """The same batch with rows padded on the right to `T` tokens."""
    more = T - batch.token_ids.shape[1]

    def pad(array: np.ndarray, fill: int = 0) -> np.ndarray:
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)], constant_values=fill)

    return replace(
        batch,
        token_ids=pad(batch.token_ids),
        mask=pad(batch.mask),
        position_ids=pad(batch.position_ids),
        visual_index=pad(batch.visual_index, -1),
        audio_index=pad(batch.audio_index, -1),
    )


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """One random key per row: the same for one seed, so that a row draws alike alone and in a batch."""
    return _keys_of(*np.asarray([divmod(s, 2**32) for s in seeds_of(seed, rows)], np.uint32).T)


def seeds_of(seed: Any, rows: int, copies: int = 1) -> list[int]:
    """The seeds of `copies` replies to each of `rows` prompts, which have one seed for all or one each.

    A prompt of seed s gets replies of the seeds s, s + 1, ... InputError for anything else, or another number of seeds.
    """
    remedy = f"a seed is a whole number from 0 to 2^63 - {copies}"
    if isinstance(seed, set | frozenset):
        raise InputError(f"seed is {shown(seed)}, which has no order; give a list, one for each conversation")
    seeds = [seed] * rows if is_whole(seed) else listed("seed", seed, remedy)
    if len(seeds) != rows:
        raise InputError(f"{len(seeds)} seeds for {rows} conversations; give one seed, or one for each")
    first = [whole("seed", s, remedy, least=0, most=2**63 - copies) for s in seeds]
    return [s + i for s in first for i in range(copies)]


@jax.jit
@jax.vmap
def _keys_of(high: jax.Array, low: jax.Array) -> jax.Array:
    """The key of a seed given by its two halves."""
    return jax.random.fold_in(jax.random.key(low), high)


def limit_of(max_new_tokens: Any) -> int:
    """A request's limit as an int; InputError for what is none."""
    return whole("max_new_tokens", max_new_tokens, "ask for a whole number, at least one token")


def stop_ids_of(stop_ids: Any, vocab_size: int) -> np.ndarray:
    """The token ids that end a reply, int32 [n], sorted and padded with an id that no token has.

    n is a power of two, so that few programs are compiled. InputError for ids outside the vocabulary.
    """
    ids = listed("stop_ids", stop_ids, "give a list of token ids")
    for i in ids:
        if not is_whole(i):
            raise InputError(f"stop id {shown(i)} is no whole number; give some from 0 to {vocab_size - 1}")
        if not 0 <= i < vocab_size:
            raise InputError(f"stop id {shown(i)} is outside the vocabulary of {vocab_size} tokens")
    ids = sorted({int(i) for i in ids})
    size = 1 << (len(ids) - 1).bit_length() if ids else 1
    return np.asarray(ids + [NO_TOKEN] * (size - len(ids)), np.int32)
