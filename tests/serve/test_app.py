"""The routes around a stand-in for what answers: errors in streams, refusals before any work, and what is counted."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from omni_jax.decode.reply import Event
from omni_jax.serve.app import make_app
from omni_jax.serve.asked import Defaults
from omni_jax.serve.guard import Bounds
from omni_jax.serve.metrics import Metrics

pytest.importorskip("httpx2")
testclient = pytest.importorskip("starlette.testclient")
SECOND = np.zeros(24_000, np.float32)
SPEECH = {"input": "Hello", "response_format": "pcm"}


class Answering:
    """Answers with given events; an exception among them is raised. It is as much of a `Serving` as the routes use."""

    def __init__(self, *events):
        self.model, self.created, self.instruction, self.planned = "m", 0, "Write {language}down.", events
        self.defaults = Defaults({"speaker": "ethan"}, 9)
        self.service = SimpleNamespace(closing=False, healthy=True, running=SimpleNamespace(voices=["ethan"]))
        self.metrics = Metrics(1, lambda: 0, lambda: 0)

    async def events(self, asked):
        for event in self.planned:
            if isinstance(event, Exception):
                raise event
            yield event

    aloud = events


def _client(*events, **headers):
    answering = Answering(*events)
    app = make_app(answering, None, Bounds(), 1)
    return testclient.TestClient(app, base_url="http://127.0.0.1:8000", headers=headers)


def _events(response):
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]


def test_errors_in_streams_of_sound_are_events(capsys):
    client = _client(Event("a", [1], audio=SECOND), ValueError("inside"))
    said = _events(client.post("/v1/audio/speech", json={**SPEECH, "stream_format": "sse"}))
    assert said[0]["type"] == "speech.audio.delta" and said[-1]["error"]["code"] == "internal_error" and len(said) == 2
    form = {"files": {"file": b"RIFF"}, "data": {"stream": "true"}}
    written = _events(client.post("/v1/audio/transcriptions", **form))
    assert written[0]["delta"] == "a" and written[-1]["error"]["type"] == "server_error" and len(written) == 2
    assert "inside" in capsys.readouterr().err
    assert _client(ValueError("before")).post("/v1/audio/transcriptions", **form).status_code == 500
