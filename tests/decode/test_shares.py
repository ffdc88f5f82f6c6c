"""Shares of the time of replies that run at once."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from omni_jax.decode import shares
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import Request
from omni_jax.decode.shares import Shares, compilations
from omni_jax.omni import Omni
from tests.parity import user


def test_each_moment_is_split_among_those_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, compiled = [0.0], list[str]()
    monkeypatch.setattr(shares, "perf_counter", lambda: clock[0])
    one, two = Request(1, Limits(1)), Request(1, Limits(1))
    split = Shares(compiled)
    clock[0] = 4.0
    split.lap([one, two])
    compiled.append("a program")
    clock[0] = 5.0
    split.lap([two])
    compiled.append("another program")
    clock[0] = 50.0
    split.skip()
    clock[0] = 56.0
    split.lap([two, one])
    assert split.take(one) == {"share_seconds": 2.0 + 3.0, "compiled": 0}
    assert split.take(two) == {"share_seconds": 2.0 + 1.0 + 3.0, "compiled": 1}


def test_compilations_are_counted_inside_the_block() -> None:
    program = jax.jit(lambda x: x * 3 + 1)
    x = jnp.arange(3.0)
    with compilations() as compiled:
        program(x)
        assert len(compiled) == 1
        program(x)
    jax.jit(lambda x: x * 5 + 1)(x)
    assert len(compiled) == 1


def test_shares_add_up_to_the_time_of_all_without_the_callers(omnis: Callable[[str], Omni]) -> None:
    omni, asked = omnis("small"), [user(text) for text in ("One.", "Two and three.", "Four.", "Five and six.")]
    settings = {"speech": True, "max_new_tokens": 5, "max_frames": 3, "stop_ids": ()}
    for slots in (1, 3):
        start, stats = time.perf_counter(), []
        for _, reply in omni.generate_many(asked, slots=slots, **settings):
            stats.append(reply.stats)
            time.sleep(0.2)
        took = time.perf_counter() - start - 0.2 * len(asked)
        assert 0.9 * took < sum(s["share_seconds"] for s in stats) <= took
        assert sum(s["share_seconds"] for s in stats) > sum(s["vocoder_seconds"] for s in stats)
