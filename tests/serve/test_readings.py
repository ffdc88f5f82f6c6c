"""Texts that are read aloud together: what fails is the one that caused it, as far as can be known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni_jax.decode.reply import Event, Reply
from omni_jax.serve import readings as module
from omni_jax.serve.errors import RequestError
from omni_jax.serve.readings import Readings

FRAMES = 3  # of a text, made one at a step, of two samples each


class Speakers:
    """Rows that make a frame at a step, unless `failing` says that they fail."""

    def __init__(self, failing: list[str]):
        self.rows: dict[int, Any] = {}
        self.failing = failing

    def insert(self, row: int, request: Any, words: str) -> Any:
        self.rows[row] = SimpleNamespace(words=words, made=0, done=False, codes=np.zeros((1, 0), np.int32))
        return self.rows[row]

    def free(self, row: int) -> None:
        del self.rows[row]

    def advance(self, *frames: int) -> None:
        for speaker in self.rows.values():
            if speaker.words in self.failing:
                raise FloatingPointError("no such frame")
        for speaker in self.rows.values():
            speaker.made += 1
            speaker.done = speaker.made == FRAMES
            speaker.codes = np.arange(speaker.made)[None]


class Vocoder:
    """The number of each frame, twice; "deaf" if it fails."""

    def __init__(self, broken: bool = False):
        self.broken, self.heard = broken, 0

    def follow(self, codes: np.ndarray, end: bool) -> np.ndarray:
        if self.broken:
            raise ValueError("deaf")
        new, self.heard = codes[0, self.heard :], codes.shape[1]
        return np.repeat(new, 2).astype(np.float32)


class Listener:
    cancelled = False

    def __init__(self, words: str):
        self.said: Any = SimpleNamespace(request=None, words=words, reply=lambda speaker, wave: Reply(words, [], {}))
        self.heard: list[Any] = []

    def put(self, *events: Any) -> None:
        self.heard += events

    @property
    def sound(self) -> list[float]:
        return [x for event in self.heard if isinstance(event, Event) and event.audio is not None for x in event.audio]

    @property
    def error(self) -> RequestError | None:
        return next((one for one in self.heard if isinstance(one, RequestError)), None)


WHOLE = [0, 0, 1, 1, 2, 2]


def _readings(failing: list[str], broken: tuple[int, ...] = ()) -> Any:
    made = iter(range(9))
    speakers: Any = lambda said: Speakers(failing)  # noqa: E731
    vocoder: Any = lambda: Vocoder(next(made) in broken)  # noqa: E731
    return Readings(2, speakers, vocoder)


def _finish(readings: Any) -> None:
    for _ in range(9):
        readings.step()
    assert not readings.busy


def test_a_text_that_fails_as_it_begins_fails_alone(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, later = map(Listener, ("good", "bad", "later"))
    readings = _readings(["bad"])
    readings.add(good)
    readings.step()
    readings.add(bad)
    readings.add(later)
    _finish(readings)
    assert bad.error is not None and bad.error.status == 500 and "together" not in bad.error.message
    for listener in (good, later):
        assert listener.error is None and listener.sound == WHOLE and listener.heard[-1] is None
    assert "no such frame" in capsys.readouterr().err, "the log says where"


def test_a_step_that_fails_is_told_to_all_who_share_it(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, later = map(Listener, ("one", "two", "three"))
    readings = _readings(failing := list[str]())
    readings.add(first)
    readings.add(second)
    readings.step()
    failing.append("two")
    readings.step()
    readings.add(later)
    _finish(readings)
    for listener in (first, second):
        assert (
            listener.error is not None and "a step of 2 texts that were read aloud together" in listener.error.message
        )
    assert later.error is None and later.sound == WHOLE


def test_sound_that_cannot_be_made_is_one_texts(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = map(Listener, ("good", "bad"))
    readings = _readings([], broken=(1,))
    readings.add(good)
    readings.add(bad)
    _finish(readings)
    assert bad.error is not None and good.error is None and good.sound == WHOLE


def test_texts_that_are_cut_end_with_an_error() -> None:
    """One in the middle, one that would have a row at once, and one that still has none."""
    reading, other, second, third = listeners = [*map(Listener, ("one", "two", "three", "four"))]
    readings = _readings([])
    for listener in listeners:
        readings.add(listener)
    readings.step()
    other.cancelled = third.cancelled = True
    readings.step()
    assert other.sound == [0, 0] and other.error is not None, "what was made before it was sent"
    assert (other.error.status, other.error.code) == (503, "shutting_down")
    assert third.error is not None and [one for one, _ in readings._waiting] == [second], "it waits for no row"
    reading.cancelled = True
    _finish(readings)
    assert reading.error is not None and reading.sound == [0, 0, 1, 1]
    assert second.error is None and second.sound == WHOLE
    assert all(isinstance(listener.heard[-1], RequestError) for listener in (reading, other, third))


@pytest.mark.parametrize("failing, broken", [(["bad"], ()), ([], (0,))])
def test_one_of_several_processes_tells_what_failed_to_all(
    failing: list[str], broken: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised, and ends the process: the others wait for it."""
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(module, "min_over_processes", lambda number: number)
    readings, listener = _readings(failing, broken), Listener("bad")
    readings.add(listener)
    with pytest.raises((FloatingPointError, ValueError)):
        readings.step()
    assert listener.heard == []


def test_a_text_that_one_of_several_processes_cannot_hold_is_refused_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(module, "min_over_processes", lambda number: 0)
    readings, listener = _readings([]), Listener("long")
    readings.add(listener)
    readings.step()
    assert listener.error is not None and listener.error.status == 400 and not readings.busy
