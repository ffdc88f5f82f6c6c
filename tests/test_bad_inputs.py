"""Every input of `tests/bad_inputs` ends in one clear sentence: no traceback, no silence, no hang."""

import importlib
import pkgutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests import bad_inputs
from tests.bad_inputs.case import Case
from tests.helpers.commands import OPAQUE

SECONDS = 20


def _cases() -> Iterator[Case]:
    for module in pkgutil.iter_modules(bad_inputs.__path__, "tests.bad_inputs."):
        yield from getattr(importlib.import_module(module.name), "CASES", ())


class World:
    """What cases share because it takes long to make: checkpoints and the model loaded from one, made when asked for.

    hf, converted: directories of the tiny random checkpoint, never to be changed; copy what is to be damaged.
    """

    def __init__(self, checkpoints: Callable[[str], Path], omnis: Callable[[str], Any], folder: Path):
        self._checkpoints, self._omnis, self._folder = checkpoints, omnis, folder

    @cached_property
    def hf(self) -> Path:
        return self._checkpoints("tiny")

    @cached_property
    def converted(self) -> Path:
        from convert import convert_checkpoint

        convert_checkpoint(self.hf, self._folder / "converted")
        return self._folder / "converted"

    @cached_property
    def omni(self) -> Any:
        return self._omnis("tiny")


@pytest.fixture(scope="module")
def world(
    checkpoints: Callable[[str], Path], omnis: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> World:
    return World(checkpoints, omnis, tmp_path_factory.mktemp("world"))


class Late(BaseException):
    """Too late; no handler of ordinary exceptions takes it for the fault of a file."""


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Late(f"not refused within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CASES = tuple(_cases())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_it_ends_in_one_clear_sentence(case: Case, world: World, tmp_path: Path) -> None:
    with _in_time(), pytest.raises(case.error) as raised:
        case.act(tmp_path, world)
    message = str(raised.value)
    for word in case.words:
        assert word in message
    assert not OPAQUE.search(message)


def test_a_hang_cannot_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "alarm", lambda seconds: seconds and signal.raise_signal(signal.SIGALRM))
    with pytest.raises(Late, match="not refused within"), _in_time():
        pass
    assert not issubclass(Late, Exception)


def test_names_are_unique_and_the_table_is_whole() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.words and all(case.words) for case in CASES)
