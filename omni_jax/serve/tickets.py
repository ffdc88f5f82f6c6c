"""What a client waits for: the events of a reply, handed from the engine's thread to the loop of the client's side."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Event, Logprobs
from omni_jax.decode.speech.aloud import Said
from omni_jax.serve.errors import RequestError

T = TypeVar("T")


class Once:
    """Lets through what was not sent before: a reply that runs again has the same beginning."""

    def __init__(self) -> None:
        self._sent = [0, 0, 0, 0]
        self.restart()

    def restart(self) -> None:
        """The next events are from the beginning of the reply again."""
        self._seen = [0, 0, 0, 0]

    def new(self, event: Event) -> Event:
        """What of an event is new."""
        wave = np.zeros(0, np.float32) if event.audio is None else event.audio
        skips = []
        for i, length in enumerate(map(len, (event.text, event.reasoning, event.token_ids, wave))):
            skips.append(min(max(self._sent[i] - self._seen[i], 0), length))
            self._seen[i] += length
            self._sent[i] = max(self._sent[i], self._seen[i])
        text, thought, token, sample = skips
        logprobs = event.logprobs
        if logprobs is not None:
            logprobs = Logprobs(logprobs.token[token:], logprobs.top_ids[token:], logprobs.top[token:])
        return replace(
            event,
            text=event.text[text:],
            reasoning=event.reasoning[thought:],
            token_ids=event.token_ids[token:],
            audio=None if event.audio is None else wave[sample:],
            logprobs=logprobs,
        )


@dataclass(eq=False)
class Ticket:
    """A reply that a client waits for, or a text to read aloud.

    loop: of the client's side; None in a process that has none. prompt: of a reply. said: the text. events: where the
    engine puts those of a step, and at last None or an error. once: what was sent. left: whether nobody waits any more.
    cancelled: the same, once the engine has agreed on it. ended: whether it has all. attempts: how often it was begun.
    """

    loop: asyncio.AbstractEventLoop | None
    prompt: Prompt | None = None
    said: Said | None = None
    events: asyncio.Queue[tuple[Event | Exception | None, ...]] = field(default_factory=asyncio.Queue)
    once: Once = field(default_factory=Once)
    left: bool = False
    cancelled: bool = False
    ended: bool = False
    attempts: int = 0

    @classmethod
    def of(cls, asked: Prompt | Said) -> "Ticket":
        """One that no client of this process waits for."""
        return cls(None, prompt=asked) if isinstance(asked, Prompt) else cls(None, said=asked)

    def put(self, *events: Event | Exception | None) -> None:
        """Hand events to the client's side, from the engine's thread; what ends the reply comes last."""
        put_all([(self, events)])


def shutting_down() -> RequestError:
    """What a client is told whose request is refused, or whose reply is cut, because the server ends."""
    return RequestError(503, "the server is shutting down; ask another one", code="shutting_down")


def put_all(given: Sequence[tuple[Ticket, tuple[Event | Exception | None, ...]]]) -> None:
    """Hand events of tickets to the client's side, from the engine's thread: its loop is woken once."""
    for ticket, events in given:
        ticket.ended = ticket.ended or not isinstance(events[-1], Event)
    awaited = [(ticket, events) for ticket, events in given if ticket.loop is not None]
    if not awaited:
        return

    def deliver() -> None:
        for ticket, events in awaited:
            ticket.events.put_nowait(events)

    loop = awaited[0][0].loop
    assert loop is not None
    try:
        loop.call_soon_threadsafe(deliver)
    except RuntimeError:  # the loop is closed: nobody waits
        for ticket, _ in awaited:
            ticket.left = True


async def each(events: AsyncGenerator[list[T], None]) -> AsyncGenerator[T, None]:
    """What comes together, one after the other."""
    async with aclosing(events) as rest:
        async for together in rest:
            for one in together:
                yield one
