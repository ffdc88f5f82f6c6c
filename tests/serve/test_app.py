"""The routes around a stand-in for what answers: errors in streams, refusals before any work, and what is counted."""

import json
import re
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni_jax.decode.reply import Event, Reply
from omni_jax.files import parse_json
from omni_jax.serve import app
from omni_jax.serve.app import LARGE_BYTES, MOST_VALUES, make_app
from omni_jax.serve.asked import Defaults
from omni_jax.serve.doors import Doors
from omni_jax.serve.guard import Bounds
from omni_jax.serve.metrics import Metrics

pytest.importorskip("httpx2")
testclient = pytest.importorskip("starlette.testclient")
SECOND = np.zeros(24_000, np.float32)
HERE = Doors("127.0.0.1")
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


def _client(*events, key=None, doors=HERE):
    answering: Any = Answering(*events)
    made = make_app(answering, key, Bounds(), doors)
    return testclient.TestClient(made, base_url="http://127.0.0.1:8000")


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


NAMED = Doors("127.0.0.1", ("omni.example.com", "*.local"))


@pytest.mark.parametrize(
    "doors, headers, status",
    [
        (HERE, {}, 200),
        (HERE, {"Host": "localhost:8000"}, 200),
        (HERE, {"Host": "[::1]:8000"}, 200),
        (HERE, {"Host": "evil.example.com:8000"}, 403),
        (HERE, {"Origin": "http://127.0.0.1:8000"}, 200),
        (HERE, {"Origin": "http://127.0.0.1:9000"}, 403),
        (HERE, {"Origin": "https://evil.example.com"}, 403),
        (HERE, {"Origin": "null"}, 403),
        (HERE, {"Origin": "http://[", "Host": "["}, 403),
        (HERE, {"Host": "evil.example.com", "Origin": "http://evil.example.com"}, 403),
        (NAMED, {"Host": "omni.example.com"}, 200),
        (NAMED, {"Host": "a.local"}, 200),
        (NAMED, {"Host": "example.com"}, 403),
        (NAMED, {"Origin": "https://omni.example.com"}, 200),  # of a proxy that sends the server's address as Host
        (NAMED, {"Origin": "https://omni.example.com:9000"}, 403),
        (Doors("node7"), {"Host": "node7:8000"}, 200),
        (Doors("node7"), {"Host": "node7:8000", "Origin": "http://node7:9000"}, 403),
        (Doors(any_host=True), {"Host": "node7"}, 200),
        (Doors(any_host=True), {"Host": "node7", "Origin": "https://evil.example.com"}, 403),
        (Doors(origins=("https://a.com",)), {"Origin": "https://a.com"}, 200),
        (Doors(origins=("https://a.com",)), {"Origin": "https://b.com"}, 403),
    ],
)
def test_pages_of_other_sites(doors, headers, status):
    found = _client(doors=doors).get("/v1/models", headers=headers)
    assert found.status_code == status and ("error" in found.json()) == (status == 403)


def test_pages_that_are_allowed_can_ask_first_and_read_answers():
    client = _client(key="k", doors=Doors(origins=("https://a.com",)))
    wish = {"Origin": "https://a.com", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    assert client.options("/v1/chat/completions", headers=wish).status_code == 200
    found = client.get("/v1/models", headers={"Origin": "https://a.com", "Authorization": "Bearer k"})
    assert found.status_code == 200 and found.headers["access-control-allow-origin"] == "https://a.com"


def test_pages_must_state_the_type_of_what_they_send():
    client, body = _client(), json.dumps({"input": " "}).encode()
    assert client.post("/v1/audio/speech", content=body).status_code == 400
    assert client.post("/v1/audio/speech", content=body, headers={"Origin": "http://127.0.0.1:8000"}).status_code == 415


def test_speech_that_was_cut_says_so():
    reply = Reply("Hello", [1], {"frames": 12, "speech_finish_reason": "length"})
    last, piece = Event("", [], reply, audio=SECOND), Event("", [], audio=SECOND)
    said = _events(_client(piece, last).post("/v1/audio/speech", json={**SPEECH, "stream_format": "sse"}))
    assert said[-1]["finish_reason"] == "length" and len(said) == 3
    whole, begun = (_client(*events).post("/v1/audio/speech", json=SPEECH) for events in ([last], [piece, last]))
    assert whole.headers["x-finish-reason"] == "length" and len(whole.content) == 2 * SECOND.size
    assert "x-finish-reason" not in begun.headers and len(begun.content) == 4 * SECOND.size


def test_all_answers_are_counted():
    client = _client(key="k")
    key = {"Authorization": "Bearer k"}
    for path, headers in [("/v1/models", {}), ("/v1/models", key), ("/v1/models/x", key), ("/x1", key), ("/x2", key),
                          ("/v1/chat/completions", key), ("/health", {"Host": "evil.com"})]:  # fmt: skip
        client.get(path, headers=headers)
    text = client.get("/metrics", headers=key).text
    found = {(route, int(status)): float(n) for route, status, n in re.findall(
        r'omni_jax_requests_total{route="(.*?)",status="(.*?)"} (.*)', text)}  # fmt: skip
    assert found == {
        ("other", 401): 1, ("other", 403): 1, ("other", 404): 2, ("/v1/models", 200): 1,
        ("/v1/models/{name:path}", 404): 1, ("/v1/chat/completions", 405): 1,
    }  # fmt: skip


def test_bodies_of_very_many_values_are_refused_before_they_are_read():
    many = b"0.5," * MOST_VALUES
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": [%b1]}' % many
    found = _client().post("/v1/chat/completions", content=body)
    assert found.status_code == 400 and f"at most {MOST_VALUES:,} are read" in found.json()["error"]["message"]


@pytest.mark.parametrize("size, beside", [(1000, False), (2 * LARGE_BYTES, True)])
def test_large_bodies_are_parsed_beside_other_requests(monkeypatch, size, beside):
    threads = []

    def parse(data, *args, **more):
        threads.append(threading.current_thread().name)
        return parse_json(data, *args, **more)

    monkeypatch.setattr(app, "parse_json", parse)
    found = _client().post("/v1/audio/speech", json={"input": "a" * size, "response_format": "aac"})
    assert found.status_code == 400 and [name.startswith("asyncio_") for name in threads] == [beside]
