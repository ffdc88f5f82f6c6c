"""Texts that are read aloud beside the replies, on the engine's thread, in rows that are taken as they come free.

They have rows and caches of their own, because they need the Talker alone; a step makes a few frames of all of them.
What fails is told to whoever listens. In one of several processes it is raised, because the others wait for it.
"""

import sys
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import jax
import numpy as np

from omni_jax.decode.answers import FIRST_FRAMES, STREAM_FRAMES
from omni_jax.decode.reply import Event
from omni_jax.decode.speech.aloud import Said
from omni_jax.decode.speech.speaker import Speaker
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.vocode import Vocoder
from omni_jax.distributed import min_over_processes
from omni_jax.errors import InputError
from omni_jax.serve.errors import RequestError, request_error
from omni_jax.serve.tickets import shutting_down


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
    """A text that is being read, and its sound so far.

    sent: samples that its listener has, perhaps of an earlier reading. ended: whether nothing more comes.
    """

    listener: L
    said: Said
    speaker: Speaker
    vocoder: Vocoder
    sent: int = 0
    ended: bool = False
    waves: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.float32)])


class Readings(Generic[L]):
    """Reads texts aloud, a few frames of each at a step."""

    def __init__(self, rows: int, make_speakers: Callable[[Said], Speakers], make_vocoder: Callable[[], Vocoder]):
        """rows: texts that are read at once. make_speakers: gives these rows, or InputError where one does not fit."""
        self._make_speakers, self._make_vocoder = make_speakers, make_vocoder
        self._speakers: Speakers | None = None
        self._waiting = deque[tuple[L, int]]()  # with the samples that they have
        self._reading: dict[int, _Reading[L]] = {}
        self._rows, self._several = rows, jax.process_count() > 1

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
        self._waiting.append((listener, 0))

    def step(self) -> None:
        """Make the next frames of all texts; what fails is told to whoever listens."""
        self._drop_cancelled()
        self._begin()
        if self._speakers is None or not self._reading:
            return
        try:
            # Short steps would hold up a text that waits for a row.
            self._speakers.advance(STREAM_FRAMES, STREAM_FRAMES if self._waiting else FIRST_FRAMES)
        except Exception as error:
            self._survive(error)
            self._fail(error)
        for row, reading in list(self._reading.items()):
            try:
                self._send(reading)
            except Exception as error:
                self._survive(error)
                reading.listener.put(request_error(error))
                reading.ended = True
            if reading.ended:
                self._speakers.free(row)
                del self._reading[row]

    def _fail(self, error: Exception) -> None:
        """After a step of all that failed, give up the texts that began with it, else all; others are read again.

        What their listeners have already is not sent twice.
        """
        all_of_them = list(self._reading.values())
        guilty, told = [one for one in all_of_them if not one.speaker.made] or all_of_them, request_error(error)
        if len(guilty) > 1 and told.status == 500:
            message = f"{told.message}; it failed in a step of {len(guilty)} texts that were read aloud together"
            told = RequestError(told.status, message, code=told.code)
        for reading in guilty:
            reading.listener.put(told)
        self._waiting.extendleft((one.listener, one.sent) for one in all_of_them[::-1] if one not in guilty)
        self._reading, self._speakers = {}, None

    def _survive(self, error: Exception) -> None:
        """Log an error that is a few texts' own; raise it where other processes wait for this one."""
        if self._several:
            raise error
        traceback.print_exc(file=sys.stderr)

    def _drop_cancelled(self) -> None:
        """Give up texts that nobody waits for before they have a row."""
        for listener, _ in self._waiting:
            if listener.cancelled:
                listener.put(shutting_down())
        self._waiting = deque(one for one in self._waiting if not one[0].cancelled)

    def _begin(self) -> None:
        """Give free rows to texts that wait."""
        while self._waiting and len(self._reading) < self._rows:
            listener, sent = self._waiting.popleft()
            try:
                self._begin_one(listener, sent)
            except Exception as error:
                if not isinstance(error, InputError):
                    self._survive(error)
                listener.put(request_error(error))

    def _begin_one(self, listener: L, sent: int) -> None:
        """Give a free row to a text; InputError, in all processes alike, for one that does not fit.

        sent: as in `_Reading`.
        """
        said, made, error = listener.said, None, None
        assert said is not None
        try:
            made = self._make_speakers(said)
        except InputError as caught:
            error = caught
        if self._several and not min_over_processes(error is None):
            error = error or InputError("another process has too little memory for this text; make it shorter")
        if error is not None:
            raise error
        self._speakers = self._speakers or made
        assert self._speakers is not None
        row = next(row for row in range(self._rows) if row not in self._reading)
        speaker = self._speakers.insert(row, said.request, said.words)
        self._reading[row] = _Reading(listener, said, speaker, self._make_vocoder(), sent)

    def _send(self, reading: _Reading[L]) -> None:
        """Send the new sound of a text; its reply comes with the last sound."""
        speaker, listener, event = reading.speaker, reading.listener, Event("", [])
        if listener.cancelled:
            reading.ended = True
            listener.put(shutting_down())
            return
        before = sum(map(len, reading.waves))
        reading.waves.append(reading.vocoder.follow(speaker.codes, speaker.done))
        new = reading.waves[-1][max(reading.sent - before, 0) :]
        reading.sent = max(reading.sent, before + len(reading.waves[-1]))
        if new.size:
            event = replace(event, audio=new)
        if speaker.done:
            reading.ended = True
            listener.put(replace(event, reply=reading.said.reply(speaker, np.concatenate(reading.waves))), None)
        elif event.audio is not None:
            listener.put(event)
