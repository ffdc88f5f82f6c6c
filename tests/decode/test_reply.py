"""What replies, events and models print, and that type checkers know every keyword."""

import inspect
import typing
from collections.abc import Callable

import numpy as np

from omni_jax.decode.arguments import GenerateArguments
from omni_jax.decode.reply import Event, Reply
from omni_jax.omni import Omni


def test_what_is_printed_is_one_short_line(omnis: Callable[[str], Omni]) -> None:
    sound, codes = np.zeros(36_000, np.float32), np.zeros((16, 19), np.int32)
    reply = Reply("Two lines,\n" + "many words " * 30, list(range(40)), {"new_tokens": 40}, sound, codes)
    for shown in (repr(reply), repr(Event("piece", [1, 2], audio=sound)), repr(omnis("tiny"))):
        assert "\n" not in shown and "array" not in shown and len(shown) < 120
    assert "40 tokens" in repr(reply) and "1.5 s of speech" in repr(reply) and "speech" not in repr(Reply("x", [1], {}))


def test_type_checkers_know_every_keyword_of_generate() -> None:
    known = set(inspect.signature(Omni.generate).parameters) - {"self", "messages", "n"}
    assert set(typing.get_type_hints(GenerateArguments)) == known
    returned = [typing.get_type_hints(one)["return"] for one in typing.get_overloads(Omni.generate)]
    assert returned == [Reply, list[Reply], list[Reply], list[list[Reply]]]
