"""What clients get whose replies the end of the server cuts: an error, never a reply that looks whole."""

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from omni_jax.decode.reply import Event, Reply
from omni_jax.serve.app import make_app
from omni_jax.serve.asked import Defaults
from omni_jax.serve.doors import Doors
from omni_jax.serve.engine import Service
from omni_jax.serve.guard import Bounds
from omni_jax.serve.metrics import Metrics
from omni_jax.serve.running import Running
from omni_jax.serve.serving import Serving
from tests.helpers.serving import listening

pytest.importorskip("uvicorn")
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What do you hear?"}], "max_tokens": 900, "ignore_eos": True,
}  # fmt: skip
STREAM = {**CHAT, "stream": True}
LONG: dict[str, Any] = {"input": 40 * "A small house by the river. "}
PCM, WAV, EVENTS = ({**LONG, **more} for more in (
    {"response_format": "pcm"}, {"response_format": "wav"}, {"response_format": "pcm", "stream_format": "sse"},
))  # fmt: skip


async def _same(messages):
    return messages


def _serving(omni, slots):
    running = Running(omni, slots)
    service, others = Service(running), SimpleNamespace(resolve=_same, close=lambda: None)
    unused: Any = others
    defaults = Defaults({"speaker": "ethan"}, omni.config.im_end_token_id, running.voices)
    metrics = Metrics(slots, lambda: service.active, lambda: service.accepted)
    return Serving("m", 0, service, unused, unused, defaults, metrics)


def _open(url, body):
    path = "/v1/audio/speech" if "input" in body else "/v1/chat/completions"
    data = json.dumps(body).encode()
    return urllib.request.urlopen(
        urllib.request.Request(url + path, data, {"Content-Type": "application/json"}), timeout=300
    )


def _refusal(url, body):
    """The status and the code of an answer that is an error."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        _open(url, body)
    return caught.value.code, json.load(caught.value)["error"]["code"]


def _until(holds):
    end = time.monotonic() + 200
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_all_that_the_end_cuts_gets_an_error(omnis):
    """A whole reply, a stream and two sounds under way, and others that wait for their slots and rows."""
    serving = _serving(omnis("tiny"), slots=2)
    service = serving.service
    app = make_app(serving, None, Bounds(), Doors("127.0.0.1"))
    with listening(app) as url, ThreadPoolExecutor(8) as pool:
        whole = pool.submit(_refusal, url, CHAT)
        # Their first piece has come.
        stream, pcm, events = (_open(url, body) for body in (STREAM, PCM, EVENTS))
        _until(lambda: service.active == 4)
        waiting = [pool.submit(_refusal, url, body) for body in (CHAT, STREAM, PCM, WAV, EVENTS)]
        _until(lambda: len(service._known) == 9)
        asyncio.run(service.drain(0, lambda: False))
        assert [one.result() for one in (whole, *waiting)] == 6 * [(503, "shutting_down")]
        *_, error, done = stream.read().decode().strip().split("\n\n")
        assert done == "data: [DONE]"
        for last in (error, events.read().decode().strip().split("\n\n")[-1]):
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        with pytest.raises(http.client.IncompleteRead) as cut:
            pcm.read()
        assert cut.value.partial


@pytest.mark.parametrize("form", ["pcm", "wav", "flac", "mp3", "opus"])
def test_a_sound_without_samples_is_an_empty_body(form):
    async def aloud(_):
        yield Event("", [], Reply("A", [1], {"frames": 0, "speech_finish_reason": "length"}))

    stand_in: Any = SimpleNamespace(
        model="m",
        defaults=Defaults({"speaker": "ethan"}, 9),
        service=SimpleNamespace(start=lambda: None, close=_same),
        workers=SimpleNamespace(close=lambda: None),
        metrics=Metrics(1, lambda: 0, lambda: 0),
        aloud=aloud,
    )
    with listening(make_app(stand_in, None, Bounds(), Doors("127.0.0.1"))) as url:
        answer = _open(url, {"input": "A", "response_format": form})
        assert answer.status == 200 and answer.headers["X-Finish-Reason"] == "length"
        assert bool(answer.read()) == (form in ("wav", "flac")), "these have a header"
