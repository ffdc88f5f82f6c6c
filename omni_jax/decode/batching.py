"""The one loop that runs requests on an engine: all at once, or through a fixed number of rows as these come free.

    waiting prompts -> prefill alone -> its row into a free one -.      (a long one in pieces, between chunks)
    a batch of prompts -> prefill together ----------------------+-> chunks of text over all rows -.
                                                        ^                 `-> frames of speech ----+-> done requests
                                                        `------------------------------------------'

A prompt from the queue runs alone and its state is written over a free row of the running state: nothing compiles for
another mixture of prompts, and no reply depends on the rows beside it. While prompts wait, a chunk ends as soon as a
row does, so no row idles longer than the host needs to read that and to run the next prompt. An engine that runs long
prompts in pieces runs one between two short chunks, so that the others never wait for a whole one. Once nobody waits,
the next chunk is dispatched before the last is read, so that the device does not wait for the host. What the host does
for prompts and replies it does while the device works.

Rows that speak do so between chunks of text, each as far as its own text allows; a row is free when its text and its
speech are complete. A reply that is heard while it is made begins with a short chunk of text and a short step of
speech, and each of the next ones may double what there is; while a prompt waits for a row, only the first is short.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.decode.chunk import Chunk
from omni_jax.decode.engine import Engine, Prefilled, most_tokens
from omni_jax.decode.request import Request
from omni_jax.decode.rows import capacity_of, idle, insert, noting_alike, retire
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.talker_loop import FRAMES
from omni_jax.decode.text import CHUNK
from omni_jax.inputs.batch import Batch

# Tokens of a chunk between two pieces of a prompt: a long prompt is held up by the others, too.
READING_STEPS = 8


@dataclass(frozen=True, eq=False)
class Admission:
    """Prompts to run together: a batch of B rows, and n requests for each row, those of a row together.

    speech: what the Talker reads to say the replies, None for text alone.
    """

    batch: Batch
    requests: Sequence[Request]
    speech: SpeechRequest | None = None


@dataclass(frozen=True, eq=False)
class _Unread:
    """A chunk that the host has not read, the request of each of its rows, and the tokens that it was asked for."""

    chunk: Chunk
    rows: tuple[Request | None, ...]
    steps: int = 1


@dataclass(eq=False)
class _Reading:
    """A prompt that is being run, and the rest of its pieces, of which the last gives the state.

    begun: whether some have run.
    """

    admission: Admission
    pieces: Iterator[Prefilled | None]
    begun: bool = False


@dataclass(frozen=True)
class _Drawn:
    """Tokens of a request: at least, unless it ends, and at most."""

    fewest: int
    most: int


class Batching:
    """Runs requests in a number of rows; iterate over `run`.

    rows: the request of each row, None where it is free. writing: the same, None where its text is complete too.
    state: what the engine decodes from. steps: of the next chunk, unless it is to be shorter. chunks: that were read.
    read_steps: of the last of them. prefill_seconds: until the first tokens were read; decode_seconds: from then on.
    Both leave out speech and what the caller does in between.
    """

    def __init__(
        self,
        engine: Engine,
        rows: int,
        first: Admission | None = None,
        waiting: Iterator[Admission | None] | None = None,
        speakers: Speakers | None = None,
        steps: int = CHUNK,
        frames: int = FRAMES,
        first_frames: int = FRAMES,
    ):
        """engine: draws the tokens. rows: requests that run at the same time. speakers: says them, in as many rows.

        first: prompts whose requests fill all rows. waiting, instead: prompts of one request each, taken as rows come
        free, one ahead; None in it stands for "none at the moment" and is asked again before every chunk. steps: of a
        chunk, at most CHUNK. frames: of speech at a time, at most FRAMES. first_frames: of a reply's first step of
        speech, from which on steps of text and speech grow; they are all alike unless these are fewer than `frames`.
        """
        assert (first is None) != (waiting is None), "either all requests at once, or prompts one by one"
        self.engine, self.waiting, self.speakers = engine, waiting, speakers
        self.steps, self.frames, self.first_frames = steps, frames, first_frames
        self.chunks, self.read_steps = 0, steps
        self.rows: list[Request | None] = [None] * rows
        self.writing: list[Request | None] = [None] * rows
        self.state: Any = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._next, self._over, self._has_read = first, waiting is None, False
        self._error: Exception | None = None
        self._reading: _Reading | None = None
        self._dropped: list[Request] = []
        self._unread: deque[_Unread] = deque()

    def run(self) -> Iterator[list[Request]]:
        """After each read of the device, the requests that are done, in the order of their rows.

        What the prompts raise is raised once all requests before it are done.
        """
        while True:
            done = self._release()
            dispatched = self._begin()
            if self._has_read:
                # The device works while the caller looks at them.
                yield done
            if self._unread:
                self._finish(dispatched)
            elif self.speakers is None or self.speakers.done:
                if self._reading is not None or self._dropped:
                    continue
                if self._error is not None:
                    raise self._error
                if self._over:
                    return
                if not done:
                    raise RuntimeError("the prompts gave None while no reply was awaited")
                continue
            if self.speakers is not None:
                # The text comes before its sound.
                yield []
                yield from self._speak(self.speakers)

    @property
    def _closed(self) -> bool:
        """Whether no further request will need a row."""
        return self._over and self._reading is None

    @property
    def _crowded(self) -> bool:
        """Whether a prompt waits for a row, and many short steps would hold it up."""
        return self._next is not None and None not in self.rows

    @property
    def entering(self) -> tuple[Request, ...]:
        """The requests whose prompts are being run."""
        return () if self._reading is None else tuple(self._reading.admission.requests)

    @property
    def times(self) -> dict[str, float]:
        """The seconds as the stats of a reply report them."""
        return {"prefill_seconds": self.prefill_seconds, "decode_seconds": self.decode_seconds}

    def finish(self) -> None:
        """Run all requests to their end."""
        for _ in self.run():
            pass

    def _begin(self) -> bool:
        """Fill free rows, and start the next chunk of text if there is one: whether there is."""
        start = time.perf_counter()
        self._drop_cancelled()
        while None in self.rows:
            if self._reading is None:
                self._look_ahead()
                if self._next is None:
                    break
                self._start_reading(self._next)
                self._next = None
            if self._read_on() and any(self.rows):
                # A piece at a time, as long as others write or speak.
                break
        dispatched = self._dispatch()
        self._count(start)
        return dispatched

    def _finish(self, dispatched: bool) -> None:
        """Read what was dispatched, with the next prompt prepared meanwhile."""
        start = time.perf_counter()
        self._look_ahead()
        self._read(dispatched)
        self._count(start)
        self._has_read = True

    def _look_ahead(self) -> None:
        """Have the next prompt prepared, if there is one; an error is kept until what runs is done."""
        if self._next is None and self.waiting is not None and not self._over:
            try:
                self._next = next(self.waiting)
            except StopIteration:
                self._over = True
            except Exception as error:
                self._over, self._error = True, error

    def _start_reading(self, admission: Admission) -> None:
        """Begin to run prompts; those that come together run at once."""
        requests = admission.requests
        for request in requests:
            request.start()
        # Only a prompt with media has hidden states that speech wants.
        has_media = admission.speech is not None and admission.speech.has_media
        taps = (self.speakers.talker.accept_hidden_layer,) if self.speakers is not None and has_media else ()
        self._reading = _Reading(admission, self._prefilled(admission.batch, requests, taps))

    def _prefilled(self, *given: Any) -> Iterator[Prefilled | None]:
        """Run prompts, those that come one by one in pieces, when asked for: None, and at last the state."""
        if self.waiting is None:
            yield self.engine.prefill(*given)
        else:
            yield from self.engine.prefill_in_pieces(*given)

    def _read_on(self) -> bool:
        """Run the next piece of the prompt that is being run; after the last, its requests have rows.

        Returns whether the prompt has several.
        """
        assert self._reading is not None
        reading, prefilled = self._reading, next(self._reading.pieces)
        reading.begun |= prefilled is None
        if prefilled is not None:
            self._admit(reading.admission, prefilled)
            self._reading = None
        return reading.begun

    def _drop_cancelled(self) -> None:
        """Give up a prompt of which some pieces have run if nobody waits for its reply any more."""
        if self._reading is None:
            return
        (request,) = self._reading.admission.requests
        request.ask_whether_cancelled()
        if request.cancelled:
            request.settle()
            self._dropped.append(request)
            self._reading = None

    def _admit(self, admission: Admission, prefilled: Prefilled) -> None:
        """Give each request of prompts that have run a free row."""
        requests = admission.requests
        self._unread.append(_Unread(prefilled.chunk, tuple(requests)))
        first, all_rows = self.rows.index(None), len(requests) == len(self.rows)
        if all_rows:
            self.state = prefilled.state
        else:
            capacity = capacity_of(prefilled.state)
            # While nobody runs, caches may become short again.
            if self.state is None or not any(self.rows) and capacity_of(self.state) > capacity:
                self.state = idle(prefilled.state, rows=len(self.rows))
            state, row = noting_alike(self.engine.grow(self.state, capacity), prefilled.state)
            self.state = insert(state, row, np.int32(first))
        self.rows[first : first + len(requests)] = self.writing[first : first + len(requests)] = requests
        if self.speakers is None or admission.speech is None:
            return
        hidden = None if prefilled.tapped is None else prefilled.tapped[0]
        if all_rows:
            for request, speaker in zip(requests, self.speakers.fill(admission.speech, requests, hidden), strict=True):
                request.speaker = speaker
        else:
            requests[0].speaker = self.speakers.insert(first, admission.speech, requests[0], hidden)

    def _dispatch(self) -> bool:
        """Start the next chunk, unless every text ends with what is under way: whether there is one."""
        running = [request for request in self.writing if request is not None]
        if all(self._drawn(request).fewest >= request.max_new_tokens for request in running):
            return False
        begun = self._begun(running)
        if self._unread and any(enough > made for enough, made in begun):
            # The device would make these frames after the chunk.
            return False
        steps = self.steps if self._reading is None else min(self.steps, READING_STEPS)
        steps = min([steps, *(max(self.first_frames, enough) for enough, _ in begun)])
        plan = self.engine.plan(self.state, steps)
        tokens = max(most_tokens([request], self._drawn(request).most + plan.most) for request in running)
        self.state = self.engine.grow(self.state, self.engine.capacity(tokens))
        # While prompts may come, with the next text that is complete: its end is told at once, and its row is free.
        until = None if self._over else 1 + self.writing.count(None)
        chunk, self.state = self.engine.dispatch(self.state, plan, self.writing, until)
        self._unread.append(_Unread(chunk, tuple(self.writing), steps))
        return True

    def _begun(self, running: Sequence[Request]) -> list[tuple[int, int]]:
        """Frames that the text under way is enough for, and frames made, of each reply that has little speech as yet.

        Empty where steps are all alike.
        """
        if self.first_frames >= self.frames:
            return []
        little = 0 if self._crowded else self.steps
        speaking = [(request, request.speaker) for request in running]
        # A frame is made with the token after that of its number.
        return [
            (self._drawn(request).fewest - 1, speaker.made)
            for request, speaker in speaking
            if speaker is not None and not speaker.done and speaker.made <= little
        ]

    def _drawn(self, request: Request) -> _Drawn:
        """How many tokens a request has once all that is under way has come."""
        chunks = [unread.chunk for unread in self._unread if request in unread.rows]
        had = len(request.token_ids)
        return _Drawn(had + sum(chunk.fewest for chunk in chunks), had + sum(chunk.plan.most for chunk in chunks))

    def _read(self, dispatched: bool) -> None:
        """Wait for chunks, hand out their tokens, and take texts that are complete out of `writing`.

        A chunk that was dispatched just now is left under way if nobody waits for a row and the host ends no request.
        """
        watched = any(request is not None and request.ends is not None for request in self.writing)
        left = 1 if dispatched and self._closed and not watched else 0
        while len(self._unread) > left:
            unread = self._unread.popleft()
            self.engine.receive(unread.chunk, unread.rows)
            self.chunks, self.read_steps = self.chunks + 1, unread.steps
        complete = [b for b, request in enumerate(self.writing) if request is not None and request.settle()]
        for b in complete:
            self.writing[b] = None
        if self._closed and not any(self.writing):
            # Nothing is decoded any more.
            self._unread.clear()
            complete = []
        for b in complete:
            self._stop_row(b)

    def _stop_row(self, b: int) -> None:
        """Tell the device that the request of row `b` has ended: by itself it knows of stop ids and limits only."""
        request = self.rows[b]
        if request is not None and (request.cancelled or request.ended or request.stop_string is not None):
            self.state = retire(self.state, np.int32(b))

    def _speak(self, speakers: Speakers) -> Iterator[list[Request]]:
        """Make frames of speech, a step between two results, as far as the texts allow.

        A reply whose text is complete speaks on as long as it holds up no other text and nothing is complete.
        """
        while any(codes.shape[1] for codes in self._advance(speakers)):
            yield []
            texts = [request for request in self.writing if request is not None]
            if texts and not any(request.speaker is not None and request.speaker.allowed for request in texts):
                return
            if self._complete():
                return

    def _advance(self, speakers: Speakers) -> list[np.ndarray]:
        """Make a step of speech: the new codes of each row."""
        return speakers.advance(self.frames, self.frames if self._crowded else self.first_frames)

    def _release(self) -> list[Request]:
        """Free the rows of requests that are complete or were cancelled: these requests, and those without a row."""
        done = self._complete()
        dropped, self._dropped = self._dropped, []
        for b, request in done.items():
            if self.writing[b] is not None:
                request.settle()
                self.writing[b] = None
                self._stop_row(b)
            if self.speakers is not None and request.speaker is not None:
                self.speakers.free(b)
            self.engine.keep(self.state, b, request)
            self.rows[b] = None
        return [*done.values(), *dropped]

    def _complete(self) -> dict[int, Request]:
        """The requests that are complete, by their rows, once those are cancelled whose prompts say so."""
        running = {b: request for b, request in enumerate(self.rows) if request is not None}
        for request in running.values():
            request.ask_whether_cancelled()
        return {b: request for b, request in running.items() if request.complete}

    def _count(self, start: float) -> None:
        """Add the time since `start` to what it was spent on."""
        seconds = time.perf_counter() - start
        if self._has_read:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds += seconds
