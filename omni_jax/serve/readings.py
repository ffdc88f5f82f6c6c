"""Texts that are read aloud beside the replies, on the engine's thread, in rows that are taken as they come free.

They have rows and caches of their own, because they need the Talker alone; a step makes a few frames of all of them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import numpy as np

from omni_jax.decode.answers import FIRST_FRAMES, STREAM_FRAMES
from omni_jax.decode.reply import Event
from omni_jax.decode.speech.aloud import Said
from omni_jax.decode.speech.speaker import Speaker
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.vocode import Vocoder
from omni_jax.serve.errors import request_error


class Listener(Protocol):
    """Who waits for a text that is read aloud. said: the text. cancelled: whether nobody waits any more."""

    cancelled: bool

    @property
    def said(self) -> Said | None: ...

    def put(self, *events: Event | Exception | None) -> None:
        """Take events, and at last None or an error."""
        ...


L = TypeVar("L", bound=Listener)


@dataclass(eq=False)
class _Reading(Generic[L]):
    """A text that is being read, and its sound so far."""

    listener: L
    said: Said
    speaker: Speaker
    vocoder: Vocoder
    waves: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.float32)])


class Readings(Generic[L]):
    """Reads texts aloud, a few frames of each at a step."""

    def __init__(self, rows: int, make_speakers: Callable[[Said], Speakers], make_vocoder: Callable[[], Vocoder]):
        """rows: texts that are read at once. make_speakers: gives these rows, or InputError where one does not fit."""
        self._make_speakers, self._make_vocoder = make_speakers, make_vocoder
        self._speakers: Speakers | None = None
        self._waiting = deque[L]()
        self._reading: dict[int, _Reading[L]] = {}
        self._rows = rows

    @property
    def busy(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._waiting or self._reading)

    @property
    def count(self) -> int:
        """The number of texts that are being read."""
        return len(self._reading)

    def add(self, listener: L) -> None:
        """Read a text as soon as a row is free."""
        self._waiting.append(listener)

    def step(self) -> None:
        """Make the next frames of all texts; what fails is told to all who listen."""
        try:
            self._begin()
            if self._speakers is not None and self._reading:
                # Short steps would hold up a text that waits for a row.
                self._speakers.advance(STREAM_FRAMES, STREAM_FRAMES if self._waiting else FIRST_FRAMES)
                for row, reading in list(self._reading.items()):
                    self._send(row, reading, self._speakers)
        except Exception as error:
            for reading in self._reading.values():
                reading.listener.put(request_error(error))
            self._reading, self._speakers = {}, None

    def _begin(self) -> None:
        """Give free rows to texts that wait."""
        while self._waiting and len(self._reading) < self._rows:
            listener = self._waiting.popleft()
            said = listener.said
            if listener.cancelled or said is None:
                listener.put(None)
                continue
            try:
                made = self._make_speakers(said)  # which checks that it fits
                self._speakers = self._speakers or made
                row = next(row for row in range(self._rows) if row not in self._reading)
                speaker = self._speakers.insert(row, said.request, said.words)
                self._reading[row] = _Reading(listener, said, speaker, self._make_vocoder())
            except Exception as error:
                listener.put(request_error(error))

    def _send(self, row: int, reading: _Reading[L], speakers: Speakers) -> None:
        """Send the new sound of a text; its reply comes with the last sound."""
        speaker, listener = reading.speaker, reading.listener
        event = Event("", [])
        if not listener.cancelled:
            reading.waves.append(reading.vocoder.follow(speaker.codes, speaker.done))
            if reading.waves[-1].size:
                event = replace(event, audio=reading.waves[-1])
        if speaker.done or listener.cancelled:
            event = replace(event, reply=reading.said.reply(speaker, np.concatenate(reading.waves)))
        if event.audio is not None or event.reply is not None:
            listener.put(event)
        if event.reply is not None:
            listener.put(None)
            speakers.free(row)
            del self._reading[row]
