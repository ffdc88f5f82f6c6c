"""The program of the first sound is compiled in a thread, and is the one that the reply's sound is made with."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.decode.shares import compilations
from omni_jax.decode.speech import sounds
from omni_jax.decode.speech.sounds import Sounds
from omni_jax.decode.speech.vocode import SHORT
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import declare
from omni_jax.weights.hf import load_hf
from tests.parity import user


@pytest.fixture
def made(checkpoints) -> Sounds:
    params, config = load_hf(checkpoints("tiny"), parts=("code2wav",))
    part = declare(Code2Wav, config.code2wav), jax.device_put(params["code2wav"], jax.devices()[0])
    return Sounds(lambda: part, config.code2wav)


def finished(sounds: Sounds) -> None:
    """Wait until nothing compiles any more."""
    for future in sounds._begun.values():
        future.exception()


def test_sound_is_made_with_the_program_that_was_begun(made: Sounds) -> None:
    codes = np.zeros((1, made._given()[2].num_quantizers, SHORT), np.int32)
    with compilations() as compiled:
        made.begin(1)
        finished(made)
        begun = len(compiled)
        assert begun
        made.begin(1)
        made.vocoder().add(codes[0])
        made.of(codes)
    assert len(compiled) == begun
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compile-code2wav")]


def test_errors_are_raised_where_sound_is_wanted_and_it_may_begin_again(
    made: Sounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sounds, "compile_first", fail)
        made.begin(1)
        finished(made)
        with pytest.raises(MemoryError, match="no room"):
            made.vocoder()
    made.begin(1)
    assert made.vocoder().rows is None


class Begun(Exception):
    """The compilation was begun, for so many rows."""


def test_every_way_to_a_spoken_reply_begins_it(omnis: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Sounds, rows: int) -> None:
        raise Begun(rows)

    monkeypatch.setattr(Sounds, "begin", begin)
    omni, asked = omnis("tiny"), user("Hello")
    with pytest.raises(Begun, match="1"):
        next(omni.stream(asked, speech=True))
    with pytest.raises(Begun, match="2"):
        omni.generate([asked, asked], speech=True)
    with pytest.raises(Begun, match="1"):
        next(omni.generate_many([asked], speech=True, slots=2))
    with pytest.raises(Begun, match="1"):
        omni.speak("Hello")
