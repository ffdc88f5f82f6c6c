"""A real server process, asked by the openai package as it comes from PyPI; replies are those of `Omni.generate`."""

import base64
import io
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import wave
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from omni_jax.inputs.audio import read_file
from omni_jax.serve.sounds import pcm16, whole
from omni_jax.settings import Voice
from tests.helpers.serving import server

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow

TEXT = [{"role": "user", "content": "What do you hear in the garden?"}]
SPOKEN = {"modalities": ["text", "audio"], "extra_body": {"max_frames": 10}}
KEY = "sk-test"


@pytest.fixture(scope="module")
def served(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    flags = ("--slots", "3", "--waiting", "6", "--api-key", KEY, "--served-model-name", "tiny", "--max-body-mib", "1",
             "--body-seconds", "2", "--allowed-local-media-path", str(folder))  # fmt: skip
    with server(checkpoints("tiny"), *flags) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def omni(omnis):
    return omnis("tiny")


def _ask(client, messages=TEXT, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 16, "seed": 3, **more})


def _url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def picture(data_dir):
    from PIL import Image

    file = io.BytesIO()
    Image.open(data_dir / "flower.jpg").resize((96, 64)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sound():
    rng = np.random.default_rng(0)
    return whole((0.1 * rng.standard_normal(24_000)).astype(np.float32), "wav")


def test_chat(client, omni):
    expected = omni.generate(TEXT, max_new_tokens=16)
    found = _ask(client)
    (choice,) = found.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.finish_reason == expected.stats["finish_reason"] and found.model == "tiny"
    assert found.usage.prompt_tokens == expected.stats["prompt_tokens"]
    assert found.usage.completion_tokens == len(expected.token_ids)


def test_stream(client, omni):
    expected = omni.generate(TEXT, max_new_tokens=16, temperature=0.8, top_k=20, seed=5)
    more = {"temperature": 0.8, "extra_body": {"top_k": 20}, "seed": 5, "stream_options": {"include_usage": True}}
    chunks = list(_ask(client, stream=True, **more))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


def test_settings_of_requests_side_by_side(client, omni):
    """Each its own, all at once."""
    wanted = [
        ({"temperature": 0.0}, {}),
        ({"temperature": 1.0, "top_p": 0.7, "seed": 8}, {"temperature": 1.0, "top_p": 0.7, "seed": 8}),
        ({"extra_body": {"repetition_penalty": 1.3}}, {"repetition_penalty": 1.3}),
        ({"temperature": 0.7, "seed": 4, "extra_body": {"min_p": 0.1}}, {"temperature": 0.7, "min_p": 0.1, "seed": 4}),
    ]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: _ask(client, **one[0]).choices[0].message.content, wanted))
    expected = [omni.generate(TEXT, max_new_tokens=16, **{"seed": 3, **settings}).text for _, settings in wanted]
    assert found == expected and len(set(found)) > 1


def test_stops(client, omni):
    plain = omni.generate(TEXT, max_new_tokens=16).text
    stop = plain[3:5]
    found = _ask(client, stop=[stop]).choices[0]
    assert found.finish_reason == "stop" and found.message.content == plain[: plain.index(stop)]
    ids = omni.generate(TEXT, max_new_tokens=16).token_ids
    found = _ask(client, extra_body={"stop_token_ids": [ids[4]]})
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens == ids.index(ids[4]) + 1


def test_several_replies(client, omni):
    expected = omni.generate(TEXT, n=2, temperature=1.0, max_new_tokens=8, seed=3)
    found = _ask(client, n=2, temperature=1.0, max_tokens=8)
    assert [choice.message.content for choice in found.choices] == [reply.text for reply in expected]
    texts = ["", ""]
    for chunk in _ask(client, n=2, temperature=1.0, max_tokens=8, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [reply.text for reply in expected]


def test_logprobs(client, omni):
    expected = omni.generate(TEXT, max_new_tokens=6, logprobs=2)
    content = _ask(client, max_tokens=6, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    np.testing.assert_allclose([one.logprob for one in content], expected.logprobs.token, atol=1e-4)
    np.testing.assert_allclose(
        [[o.logprob for o in one.top_logprobs] for one in content], expected.logprobs.top, atol=1e-4
    )


def test_vision(client, omni, picture):
    content = [{"type": "image_url", "image_url": {"url": _url(picture, "image/png"), "detail": "auto"}},
               {"type": "text", "text": "What do you see?"}]  # fmt: skip
    own = [{"type": "image", "image": picture}, content[1]]
    expected = omni.generate([{"role": "user", "content": own}], max_new_tokens=16)
    found = _ask(client, [{"role": "user", "content": content}])
    assert found.choices[0].message.content == expected.text
    details = found.usage.prompt_tokens_details
    assert details.image_tokens == 6 and found.usage.prompt_tokens == expected.stats["prompt_tokens"]


def test_sound(client, omni, sound):
    data = base64.b64encode(sound).decode()
    content = [
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "text", "text": "And?"},
    ]
    own = [{"type": "audio", "audio": sound}, content[1]]
    expected = omni.generate([{"role": "user", "content": own}], max_new_tokens=16)
    found = _ask(client, [{"role": "user", "content": content}])
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens_details.audio_tokens == 13


def test_transcription(client, omni, sound):
    words = {"type": "text", "text": "Transcribe the English audio into text."}
    own = [{"role": "user", "content": [{"type": "audio", "audio": sound}, words]}]
    expected = omni.generate(own, max_new_tokens=16)
    stated = {"file": ("a.wav", sound), "model": "tiny", "language": "en", "extra_body": {"max_tokens": 16, "seed": 3}}
    assert client.audio.transcriptions.create(**stated).text == expected.text
    assert client.audio.transcriptions.create(**stated, response_format="text") == expected.text
    events = list(client.audio.transcriptions.create(**stated, stream=True))
    assert "".join(e.delta for e in events if e.type == "transcript.text.delta") == expected.text
    assert events[-1].type == "transcript.text.done" and events[-1].text == expected.text


@pytest.fixture(scope="module")
def spoken(omni):
    return omni.generate(TEXT, speech=True, max_new_tokens=16, seed=3, max_frames=10)


def test_speech_whole(client, spoken):
    message = _ask(client, audio={"voice": "ethan", "format": "wav"}, **SPOKEN).choices[0].message
    assert message.audio.transcript == spoken.text == message.content
    with wave.open(io.BytesIO(base64.b64decode(message.audio.data))) as file:
        assert file.readframes(file.getnframes()) == pcm16(spoken.audio)
    flac = _ask(client, audio={"voice": "Ethan", "format": "flac"}, **SPOKEN).choices[0].message.audio
    samples, rate = read_file(base64.b64decode(flac.data))
    assert rate == 24_000 and samples.size == spoken.audio.size


def test_speech_streamed(client, spoken):
    sound, text, transcript = b"", "", ""
    for chunk in _ask(client, audio={"voice": "ethan", "format": "pcm16"}, stream=True, **SPOKEN):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if (audio := choice.delta.audio) is not None:
                assert chunk.model_extra["modality"] == "audio"
                sound += base64.b64decode(audio.data)
                transcript += audio.transcript
    assert text == transcript == spoken.text
    assert sound == pcm16(spoken.audio)


WORDS = "A small house by the river."
ALOUD = {"model": "tiny", "input": WORDS, "voice": "ethan", "extra_body": {"max_frames": 10, "seed": 3}}


@pytest.fixture(scope="module")
def aloud(omni):
    return omni.speak(WORDS, voice=Voice(max_frames=10), seed=3)


def test_text_to_speech(client, aloud):
    """Several at once, beside a reply."""
    with ThreadPoolExecutor(4) as pool:
        said = [pool.submit(client.audio.speech.create, **ALOUD, response_format="pcm") for _ in range(3)]
        reply = pool.submit(_ask, client)
        assert all(one.result().read() == pcm16(aloud.audio) for one in said) and reply.result().choices
    samples, rate = read_file(client.audio.speech.create(**ALOUD, response_format="flac").read())
    assert rate == 24_000 and samples.size == aloud.audio.size
    assert client.audio.speech.create(**ALOUD, response_format="wav").read()[44:] == pcm16(aloud.audio)
    mp3 = client.audio.speech.create(**ALOUD)
    assert mp3.response.headers["content-type"] == "audio/mpeg" and len(mp3.read()) > 500


def test_text_to_speech_as_events(client, aloud):
    stated = {**ALOUD, "response_format": "pcm", "stream_format": "sse"}
    with client.audio.speech.with_streaming_response.create(**stated) as answer:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    assert b"".join(base64.b64decode(e["audio"]) for e in events[:-1]) == pcm16(aloud.audio) and len(events) > 2
    assert events[-1]["type"] == "speech.audio.done" and events[-1]["usage"]["output_tokens"] == 10


@pytest.mark.parametrize("fields", [{"voice": "nobody"}, {"input": ""}, {"speed": 2.0}, {"response_format": "aac"}])
def test_what_cannot_be_said(client, fields):
    with pytest.raises(openai.BadRequestError):
        client.audio.speech.create(**{**ALOUD, **fields})


def test_tools(client, omni):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    expected = omni.generate(TEXT, tools=tools, max_new_tokens=8)
    found = _ask(client, tools=tools, max_tokens=8)
    assert (
        found.choices[0].message.content == expected.text
        and expected.text != omni.generate(TEXT, max_new_tokens=8).text
    )
    assert found.usage.prompt_tokens == expected.stats["prompt_tokens"]
    call = {"id": "call-1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [
        *TEXT,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "a"},
    ]
    assert _ask(client, turns, tools=tools, max_tokens=4).usage.completion_tokens == 4


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    model = client.models.retrieve("tiny")
    assert model.id == "tiny" and "ethan" in model.model_extra["voices"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    "fields, param",
    [({"temperature": 9e9}, "temperature"), ({"extra_body": {"unknown": 1}}, "unknown"), ({"n": 500}, "n"),
     ({"max_tokens": 10**6}, "max_tokens"), ({"stop": ""}, "stop"),
     ({"modalities": ["audio"], "audio": {"voice": "nobody", "format": "wav"}}, "audio.voice"),
     ({"stream": True, "max_completion_tokens": 10**6, "max_tokens": None}, "max_completion_tokens"),
     ({"extra_body": {"stop_token_ids": [10**6]}}, "stop_token_ids"),
     ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
      "messages[0].content[0]"),
     ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
      "messages[0].content[0]"), ({"messages": [{"role": "nobody", "content": "x"}]}, "messages")],
)  # fmt: skip
def test_bad_requests(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(client, **fields)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_other_errors(client, served):
    with pytest.raises(openai.AuthenticationError):
        _ask(openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-wrong", max_retries=0))
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=TEXT)
    with pytest.raises(openai.APIStatusError) as caught:
        _ask(client, [{"role": "user", "content": "x" * (1 << 20)}])
    assert caught.value.status_code == 413


# What benchmarks send: `vllm bench serve` with its backend openai-chat and vllm-omni's, and SGLang's `bench_serving`.
BENCHMARKS = {
    "openai-chat": {
        "max_completion_tokens": 12, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    },
    "openai-chat-omni": {
        "temperature": 0, "max_tokens": 12, "stream": True, "modalities": ["text", "audio"], "max_frames": 10,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "audio": {"format": "wav"},
    },
    "sglang-oai-chat": {"max_completion_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True},
}  # fmt: skip


@pytest.mark.parametrize("backend", BENCHMARKS)
def test_what_benchmarks_send_and_read(served, omni, backend):
    """Each reads streams in its own way: text and usage, sound by `modality`, or counts at the end if there are any."""
    content = [{"type": "text", "text": TEXT[0]["content"]}]
    messages = [{"role": "user", "content": content if backend == "openai-chat" else TEXT[0]["content"]}]
    models = json.loads(_raw(served, "/v1/models")[1])["data"]
    body = {"model": models[0]["id"], "messages": messages, **BENCHMARKS[backend]}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", "x-request-id": "bench-0"}
    status, answer = _raw(served, "/v1/chat/completions", json.dumps(body).encode(), headers)
    assert status == 200
    text, samples, counts, ended = "", 0, [], False
    for line in answer.decode().splitlines():
        if not line or line.startswith(":"):
            continue
        data = line.removeprefix("data: ")
        ended = data == "[DONE]"
        if ended:
            continue
        chunk = json.loads(data)
        delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
        if chunk.get("modality") == "audio" and (delta.get("audio") or {}).get("data"):
            with wave.open(io.BytesIO(base64.b64decode(delta["audio"]["data"]))) as piece:
                samples += piece.getnframes()
        else:
            text += delta.get("content") or ""
        if chunk.get("usage"):
            counts.append(chunk["usage"]["completion_tokens"])
    more = {"speech": True, "max_frames": 10} if backend == "openai-chat-omni" else {"stop_ids": ()}
    expected = omni.generate(messages, max_new_tokens=12, **more)
    assert ended and text == expected.text and counts == sorted(counts)
    assert counts[-1] == len(expected.token_ids) + (0 if expected.codes is None else expected.codes.shape[1])
    assert samples == (0 if expected.audio is None else len(expected.audio))


def _raw(served, path, data=None, headers=None):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} if headers is None else headers
    request = urllib.request.Request(served.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    "path, data, status",
    [
        ("/v1/chat/completions", b"{", 400), ("/v1/chat/completions", b"\xff\xfe\xff", 400),
        ("/v1/chat/completions", b"[" * 5000, 400), ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", None, 405), ("/nothing", None, 404), ("/v1/audio/transcriptions", b"{}", 415),
        ("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode(), 400),
    ],
)  # fmt: skip
def test_broken_requests(served, path, data, status):
    found, body = _raw(served, path, data)
    assert found == status and json.loads(body)["error"]["message"]


def test_keys_guard_all_but_health(served):
    assert _raw(served, "/health", headers={})[0] == 200
    for path in ("/metrics", "/v1/models", "/v1/chat/completions", "/health/"):
        assert _raw(served, path, headers={})[0] == 401
        assert _raw(served, path, headers={"Authorization": "Bearer "})[0] == 401
    status, text = _raw(served, "/metrics")
    assert status == 200 and b"omni_jax_slots 3.0" in text and b"omni_jax_compiled_programs" in text


def test_slow_bodies_end(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(1000).split(b"\r\n")[0]


def test_clients_that_go_free_their_slots(served, client):
    """More than there are slots, each in the middle of its stream, or while it waits for the whole."""
    for _ in range(5):
        stream = _ask(client, stream=True, max_tokens=150, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        _ask(client, max_tokens=150, timeout=0.3, extra_body={"ignore_eos": True})
    start = time.monotonic()
    while b"omni_jax_running 0.0" not in _raw(served, "/metrics")[1]:
        assert time.monotonic() - start < 60
        time.sleep(0.2)


def test_too_many_at_once(served, client):
    def ask(i):
        try:
            return _ask(client, max_tokens=60, seed=i, extra_body={"ignore_eos": True}).choices[0].finish_reason
        except openai.RateLimitError as error:
            return int(error.response.headers["Retry-After"])

    with ThreadPoolExecutor(14) as pool:
        found = list(pool.map(ask, range(14)))
    refused = [one for one in found if one != "length"]
    assert 1 <= len(refused) <= 5 and all(1 <= seconds <= 60 for seconds in refused)
    assert _ask(client, max_tokens=2).choices[0].finish_reason


def test_terminating_finishes_what_runs(checkpoints):
    with server(checkpoints("tiny"), "--slots", "2") as found:
        client = openai.OpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0, timeout=300)
        stream = client.chat.completions.create(
            model=checkpoints("tiny").name, messages=TEXT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        threading.Timer(0.2, found.process.send_signal, (signal.SIGTERM,)).start()
        time.sleep(0.5)
        status, body = _raw(found, "/health", headers={})
        assert (status, json.loads(body)["status"]) == (503, "closing")
        finishes = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert finishes == ["length"] and found.process.wait(60) == 0
