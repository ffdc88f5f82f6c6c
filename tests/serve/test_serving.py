"""What is sent of a reply: nothing is lost, and what has come by then goes together."""

import asyncio
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from omni_jax.decode.reply import Event, Reply
from omni_jax.serve.asked import Defaults, read_chat
from omni_jax.serve.metrics import Metrics
from omni_jax.serve.serving import Serving

BODY = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
STATS = {"finish_reason": "stop"}


@pytest.fixture
def serving(omnis):
    """A server of a model whose engine gives what `planned` holds: events, moments in which others work, errors."""
    omni, planned = omnis("tiny"), []

    async def answer(prompt):
        for one in planned:
            if isinstance(one, float):
                await asyncio.sleep(one)
            elif isinstance(one, Exception):
                raise one
            else:
                yield one

    service: Any = SimpleNamespace(places=lambda n: nullcontext(), answer=answer, running=SimpleNamespace(omni=omni))
    unused: Any = None
    media: Any = SimpleNamespace(resolve=_same)
    made = Serving("m", 0, service, unused, media, Defaults({}, 9), Metrics(1, lambda: 0, lambda: 0))
    return made, planned


async def _same(messages):
    return messages


def _sent(serving):
    async def inside():
        return [piece async for piece in serving.chunks(read_chat(BODY, serving.defaults))]

    return asyncio.run(inside())


def test_what_comes_together_is_sent_together(serving):
    made, planned = serving
    planned += [Event("Good", [1]), 0.05, Event(" day", [2]), Event("", [], Reply("Good day", [1, 2], STATS))]
    first, last = _sent(made)
    assert '"role":"assistant"' in first and '"content":"Good"' in first
    assert '"content":" day"' in last and '"finish_reason":"stop"' in last and last.endswith("data: [DONE]\n\n")


def test_what_comes_with_an_error_is_sent_before_it(serving):
    made, planned = serving
    planned += [Event("Good", [1]), 0.05, Event(" day", [2]), RuntimeError("the engine is gone")]
    first, more, error = _sent(made)
    assert '"content":"Good"' in first and '"content":" day"' in more
    assert '"error":' in error and '"content"' not in error
