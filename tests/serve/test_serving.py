"""What is sent of a reply: nothing is lost, and what has come by then goes together."""

import asyncio
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from omni_jax.decode.reply import Event, Reply
from omni_jax.serve.app import make_app
from omni_jax.serve.asked import Defaults, read_chat
from omni_jax.serve.doors import Doors
from omni_jax.serve.guard import Bounds
from omni_jax.serve.metrics import Metrics
from omni_jax.serve.serving import Serving
from tests.helpers.serving import listening

BODY = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
STATS = {"finish_reason": "stop"}


@pytest.fixture
def serving(omnis):
    """A server of a model whose engine gives what `planned` holds: events of a step, moments between steps, errors."""
    omni, planned = omnis("tiny"), []

    async def answer_together(prompt):
        for one in planned:
            if isinstance(one, float):
                await asyncio.sleep(one)
            elif isinstance(one, Exception):
                raise one
            else:
                yield one

    service: Any = SimpleNamespace(
        places=lambda n: nullcontext(), answer_together=answer_together, running=SimpleNamespace(omni=omni)
    )
    workers: Any = SimpleNamespace()
    media: Any = SimpleNamespace(resolve=_same)
    made = Serving("m", 0, service, workers, media, Defaults({}, 9), Metrics(1, lambda: 0, lambda: 0))
    return made, planned


async def _same(messages):
    return messages


def _sent(serving):
    async def inside():
        return [piece async for piece in serving.chunks(read_chat(BODY, serving.defaults))]

    return asyncio.run(inside())


def test_what_comes_together_is_sent_together(serving):
    made, planned = serving
    planned += [[Event("Good", [1])], 0.05, [Event(" day", [2]), Event("", [], Reply("Good day", [1, 2], STATS))]]
    first, last = _sent(made)
    assert '"role":"assistant"' in first and '"content":"Good"' in first
    assert '"content":" day"' in last and '"finish_reason":"stop"' in last and last.endswith("data: [DONE]\n\n")


def test_what_comes_with_an_error_is_sent_before_it(serving, capsys):
    made, planned = serving
    planned += [[Event("Good", [1])], 0.05, [Event(" day", [2])], RuntimeError("the engine is gone")]
    first, more, error = _sent(made)
    assert '"content":"Good"' in first and '"content":" day"' in more
    assert '"error":' in error and '"content"' not in error
    assert "the engine is gone" in capsys.readouterr().err and "the engine is gone" not in error


CALLS = (
    '<tool_call>{"name": "look", "arguments": {"at": "ü\\ud83d"}}</tool_call>\n<tool_call>{"name": "go"}</tool_call>'
)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("look", "go")]


def test_calls_of_tools_reach_a_client_of_openai(serving):
    """Over HTTP, whole and streamed."""
    openai = pytest.importorskip("openai")
    made, planned = serving
    made.service.start, made.service.close, made.workers.close = (lambda: None), _closed, (lambda: None)
    text = f"I look.\n{CALLS}"
    planned += [[Event(text[:30], [1])], [Event(text[30:], [2]), Event("", [], Reply(text, [1, 2], STATS))]]
    with listening(make_app(made, None, Bounds(), Doors())) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked = {"model": "m", "messages": BODY["messages"], "tools": TOOLS}
        (choice,) = client.chat.completions.create(**asked).choices
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert "".join(delta.content or "" for delta in deltas) == "I look." and [call.index for call in calls] == [0, 1]
    for found in (choice.message.tool_calls, calls):
        assert [call.function.name for call in found] == ["look", "go"] and len({call.id for call in found}) == 2
        assert [json.loads(call.function.arguments) for call in found] == [{"at": "ü\ud83d"}, {}]


async def _closed(seconds):
    pass
