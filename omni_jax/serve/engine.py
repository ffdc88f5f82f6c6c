"""The engine of the server: one thread owns JAX and runs all replies in slots; asyncio talks to it through queues.

    asyncio: Service.answer(prompt) -> Ticket -> queue --.      .-- events, one queue for each reply <- asyncio
                                                          v    |
    thread:               Batching takes tickets as slots come free, and follows what runs

A reply whose client has gone is cancelled, and frees its slot within a chunk. One that the end of the server cuts ends
with an error. What fails is one reply, as far as can be known: the one whose sound could not be made, or that was just
admitted, else the longest. The others run again from their prompts, which gives the same tokens and sound, and what
their clients have already is not sent twice.

Several processes that hold one model run the same loop. What only the first one knows, because clients talk to it, is
agreed on once per step: new tickets, and those whose clients have gone. If one fails, all end.
"""

import asyncio
import os
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import NamedTuple

import jax

from omni_jax.decode.answers import STREAM_STEPS, Follower
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Event
from omni_jax.decode.speech.aloud import Said
from omni_jax.decode.text import CHUNK
from omni_jax.distributed import is_primary, min_over_processes, value_from_first
from omni_jax.errors import InputError
from omni_jax.process import FAILED
from omni_jax.serve.errors import RequestError, invalid, request_error
from omni_jax.serve.readings import Readings
from omni_jax.serve.running import Running, failed_request
from omni_jax.serve.tickets import Ticket, each, put_all, shutting_down

ATTEMPTS = 3  # of a reply, when others make the engine fail
STEP_SECONDS = 0.1
AGREE_SECONDS = 1.0  # after which processes that have nothing to do hear of each other
MOST_RETRY_SECONDS = 60


class News(NamedTuple):
    """What the engine learns at a step.

    begun: prompts and texts that clients ask for. left: the places, among all that have not ended, of those whose
    clients have gone. ending: whether nothing more will come. steps: tokens that replies draw at a step while all slots
    are taken.
    """

    begun: list[Prompt | Said]
    left: list[int]
    ending: bool
    steps: int


class Pace:
    """How many tokens replies draw at a step while all slots are taken, so that one takes about STEP_SECONDS.

    Short steps cost the host more than the device; long ones keep prompts waiting, and text comes in jerks.
    """

    def __init__(self) -> None:
        self.steps, self._chunks, self._last = STREAM_STEPS, 0, 0.0

    def lap(self, chunks: int, drawn: int, now: float) -> None:
        """So many chunks of text have been read, the last one of `drawn` tokens, at `now` of `time.monotonic`."""
        if chunks == self._chunks:
            return
        seconds, self._chunks, self._last = now - self._last, chunks, now
        if drawn < STREAM_STEPS:
            # A prompt's first token, or the short steps in which speech begins: they do not say how long a token takes.
            return
        wanted = drawn * STEP_SECONDS / max(seconds, 1e-6)
        # Slowly up, and at once down.
        self.steps = round(min(max(min(wanted, self.steps + 2), STREAM_STEPS), CHUNK))


class Service:
    """Runs replies to prompts until it is closed."""

    def __init__(self, running: Running, waiting: int = 64):
        """running: how the model is run. waiting: the most replies that wait for a slot."""
        self.running, self.waiting = running, waiting
        self.accepted = 0
        self.closing = False
        self._cut = self._ending = False
        self._tickets: queue.Queue[Ticket | None] = queue.Queue()
        self._asked = set[Ticket]()  # of the clients' side
        self._known: list[Ticket] = []  # of the engine's side
        self._again: deque[Ticket] = deque()
        self._following: dict[int, tuple[Ticket, Follower]] = {}
        self._readings: Readings[Ticket] = running.readings()
        self._number, self._seconds, self._failures = 0, 1.0, 0
        self._pace, self._steps = Pace(), STREAM_STEPS
        self._several, self._first = jax.process_count() > 1, is_primary()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread, if it has not been started."""
        if self._thread.ident is None:
            self._thread.start()

    def follow(self) -> None:
        """Run what process 0 tells, in a process that has no clients, until it ends."""
        self._work()

    @property
    def healthy(self) -> bool:
        """Whether replies can be expected: the thread runs, and does not fail again and again."""
        return self._thread.is_alive() and self._failures < ATTEMPTS

    @property
    def active(self) -> int:
        """The number of replies in slots, and of texts that are being read aloud."""
        # One more is prepared ahead while all slots are taken.
        return min(len(self._following), self.running.slots) + self._readings.count

    @contextmanager
    def places(self, n: int) -> Iterator[None]:
        """Room for n replies while a request is worked on; RequestError 429 if there is none, 503 while closing."""
        if self.closing:
            raise shutting_down()
        most = self.running.slots + self.waiting
        if n > most:
            raise invalid(f"{n} replies are more than the {most} that this server holds at once; ask for fewer", "n")
        if self.accepted + n > most:
            raise RequestError(429, f"{self.accepted} replies are under way or wait, of at most {most}; try again soon",
                               code="queue_full", retry_seconds=self._retry_seconds())  # fmt: skip
        self.accepted += n
        try:
            yield
        finally:
            self.accepted -= n

    def answer(self, prompt: Prompt) -> AsyncGenerator[Event, None]:
        """The events of the reply to a prompt, the last one with the whole reply; what fails is raised.

        Leave the iterator early, or close it, to cancel the reply.
        """
        return each(self.answer_together(prompt))

    def answer_together(self, prompt: Prompt) -> AsyncGenerator[list[Event], None]:
        """As `answer`, with the events that come at once together."""
        return self._together(Ticket(asyncio.get_running_loop(), prompt))

    def read_aloud(self, said: Said) -> AsyncGenerator[Event, None]:
        """The events of a text that is read aloud, as `answer` has them."""
        return each(self._together(Ticket(asyncio.get_running_loop(), said=said)))

    async def _together(self, ticket: Ticket) -> AsyncGenerator[list[Event], None]:
        """The events of a ticket, which the engine gets now, those of a step together."""
        if self._cut:
            raise shutting_down()
        self._asked.add(ticket)
        self._tickets.put(ticket)
        start = time.monotonic()
        try:
            ended = False
            while not ended:
                come = await ticket.events.get()
                ended = come[-1] is None
                if events := [event for event in come if isinstance(event, Event)]:
                    yield events
                if isinstance(come[-1], Exception):
                    raise come[-1]
            self._seconds += 0.1 * (time.monotonic() - start - self._seconds)
        finally:
            ticket.left = True
            self._asked.discard(ticket)

    async def drain(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Take no request any more, and finish those that were taken, for at most so many seconds; then cancel them.

        hurry: whether not to wait any longer.
        """
        self.closing = True
        end = time.monotonic() + seconds
        while self.accepted and time.monotonic() < end and not hurry():
            await asyncio.sleep(0.05)
        self._cancel()

    async def close(self, seconds: float) -> None:
        """End the thread: finish what runs, for at most so many seconds, then cancel it."""
        self.closing = True
        self._tickets.put(None)
        await asyncio.to_thread(self._thread.join, seconds)
        self._cancel()
        await asyncio.to_thread(self._thread.join, 10.0)

    def _cancel(self) -> None:
        """Have all that runs or waits end soon, with an error, and what is still being prepared too."""
        self._cut = True
        for ticket in self._asked:
            ticket.left = True

    def _retry_seconds(self) -> int:
        """About when a place comes free."""
        rounds = 1 + max(self.accepted - self.running.slots, 0) // self.running.slots
        return min(max(ceil(self._seconds * rounds / 2), 1), MOST_RETRY_SECONDS)

    def _work(self) -> None:
        """The thread: run replies, and those that are left once more after each failure, until it is closed."""
        while not self._run():
            pass

    def _run(self) -> bool:
        """Run replies: whether the service is closed, and did not fail."""
        batching = self.running.batching(self._admissions())
        try:
            with self._failing_together():
                for finished in batching.run():
                    self._pace.lap(batching.chunks, batching.read_steps, time.monotonic())
                    # A request that finds a free slot need not wait for a long step to end.
                    batching.steps = STREAM_STEPS if None in batching.rows else self._steps
                    self._send({request.number for request in finished}, batching)
                    self._readings.step()
                    self._agree(wait=False)
                    self._failures = 0
            return True
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self._failures += 1
            self._fail(batching, request_error(error))
            # Frames of the loop hold its caches.
            traceback.clear_frames(error.__traceback__)
        return False

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """End this process if it fails and is one of several: the others wait for it in what it does not reach."""
        try:
            yield
        except Exception:
            if not self._several:
                raise
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            os._exit(FAILED)

    def _admissions(self) -> Iterator[Admission | None]:
        """Prompts for free slots, one ahead; None while there are none and others run."""
        # The loop would go on until what runs is done, before it raises what fails here.
        with self._failing_together():
            while True:
                ticket = self._next()
                if ticket is None and self._following:
                    yield None
                elif ticket is None and self._readings.busy:
                    self._readings.step()
                elif ticket is None and self._ending:
                    return
                elif ticket is None or ticket.prompt is None:
                    continue
                elif (admission := self._admitted(ticket, ticket.prompt)) is not None:
                    yield admission

    def _next(self) -> Ticket | None:
        """The next ticket; None if there is none now, and something runs, or if the service closes."""
        if not self._again:
            self._agree(wait=not (self._following or self._readings.busy or self._ending))
        return self._again.popleft() if self._again else None

    def _agree(self, wait: bool) -> None:
        """Learn what clients have asked for and given up, in all processes alike; wait: for the first of it."""
        self._known = [ticket for ticket in self._known if not ticket.ended]
        begun, ending = self._come(wait) if self._first else ([], False)
        left = [i for i, ticket in enumerate(self._known) if ticket.left]
        if self._several:
            asked = [ticket.prompt or ticket.said for ticket in begun]
            found = News([one for one in asked if one is not None], left, ending, self._pace.steps)
            news = value_from_first(found)
            left, ending, self._steps = news.left, news.ending, news.steps
            if not self._first:
                begun = [Ticket.of(one) for one in news.begun]
        else:
            self._steps = self._pace.steps
        for i in left:
            self._known[i].cancelled = True
        self._ending = self._ending or ending
        self._known += begun
        self._queue(begun)

    def _queue(self, tickets: Sequence[Ticket]) -> None:
        """Have these wait for slots, and give up those that nobody waits for any more, or that the end of all cuts.

        Texts to read aloud have rows of their own: they do not wait behind prompts.
        """
        for ticket in tickets:
            if ticket.said is None:
                self._again.append(ticket)
            else:
                self._readings.add(ticket)
        for ticket in self._again:
            if ticket.cancelled:
                ticket.put(shutting_down())
        self._again = deque(ticket for ticket in self._again if not ticket.cancelled)

    def _come(self, wait: bool) -> tuple[list[Ticket], bool]:
        """The tickets that have come, and whether they were the last ones."""
        found: list[Ticket | None] = []
        try:
            while True:
                block = wait and not found
                found.append(self._tickets.get(block, AGREE_SECONDS if self._several and block else None))
        except queue.Empty:
            return [ticket for ticket in found if ticket is not None], None in found

    def _admitted(self, ticket: Ticket, prompt: Prompt) -> Admission | None:
        """The request of a ticket's prompt; None for one that cannot be, whose client is told."""
        self._number, ticket.attempts = self._number + 1, ticket.attempts + 1
        ticket.once.restart()
        error: Exception | None = None
        try:
            admission = self.running.admission(replace(prompt, cancelled=lambda: ticket.cancelled), self._number)
            follower = self.running.follower(admission)
        except Exception as caught:
            error = caught
            if not isinstance(error, InputError):
                traceback.print_exc(file=sys.stderr)
        if self._several and not min_over_processes(error is None):
            error = error or InputError("another process has too little memory for this request; make it smaller")
        if error is not None:
            ticket.put(request_error(error))
            return None
        self._following[self._number] = ticket, follower
        return admission

    def _send(self, finished: set[int], batching: Batching) -> None:
        """Send what is new of all replies, and the end of those that are finished."""
        sent = []
        for number, (ticket, follower) in list(self._following.items()):
            events = () if ticket.ended else self._news(ticket, follower, batching, number in finished)
            if number in finished:
                del self._following[number]
            if events:
                sent.append((ticket, tuple(events)))
        put_all(sent)

    def _news(
        self, ticket: Ticket, follower: Follower, batching: Batching, finished: bool
    ) -> list[Event | Exception | None]:
        """What is new of a reply, and its end if it is finished; what fails here, such as its sound, is its own."""
        request, events = follower.request, list[Event | Exception | None]()
        if ticket.cancelled:  # nobody waits, or the server ends
            return [shutting_down()]
        try:
            events += [ticket.once.new(event) for event in follower.events()]
            if finished:
                last = follower.last(batching.engine.stats(request), {"seconds": request.seconds})
                events += [ticket.once.new(last), None]
        except Exception as error:
            if self._several:
                raise
            traceback.print_exc(file=sys.stderr)
            request.cancel()
            events.append(request_error(error))
        return events

    def _fail(self, batching: Batching, error: Exception) -> None:
        """Give up the reply that made the loop fail, and have the others run again."""
        guilty = failed_request(batching, [one.request for t, one in self._following.values() if not t.ended])
        again = list[Ticket]()
        for ticket, follower in self._following.values():
            if ticket.ended:
                continue
            if follower.request is guilty or ticket.attempts >= ATTEMPTS:
                ticket.put(error)
            else:
                again.append(ticket)
        self._following.clear()
        self._queue(again)
