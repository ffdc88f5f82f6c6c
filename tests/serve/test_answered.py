"""Replies as OpenAI's objects, whole and in chunks: both say the same, and the openai package reads them."""

import base64
import json
import wave
from io import BytesIO

import numpy as np
import pytest

from omni_jax.decode.reply import Event, Logprobs, Reply
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.serve.answered import ChatStream, Choice, Heading, Usage, completion_body
from omni_jax.serve.asked import Defaults, read_chat
from omni_jax.serve.sounds import pcm16

chat = pytest.importorskip("openai.types.chat")

MESSAGES = [{"role": "user", "content": "Hello"}]
WAVE = np.linspace(-0.5, 0.5, 4000).astype(np.float32)
STATS = {"finish_reason": "stop", "frames": 2, "rounds": 3, "round_tokens": [1, 3, 2], "drafted": 9}


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return Tokenizer(checkpoints("tiny"))


def _logprobs(n):
    return Logprobs(np.full(n, -0.5, np.float32), np.tile([7, 8], (n, 1)), np.tile([-0.5, -2.0], (n, 1)))


def _events(tokenizer, text, speech=False, logprobs=False, reasoning=None):
    ids = [*tokenizer.encode(text), 1]
    stats = STATS | ({"speech_finish_reason": "length"} if speech else {})
    reply = Reply(text, ids, stats, audio=WAVE if speech else None, reasoning=reasoning)
    middle = len(text) // 2
    yield Event("", [], reasoning=reasoning or "")
    yield Event(text[:middle], ids[:2], logprobs=_logprobs(2) if logprobs else None)
    if speech:
        yield Event("", [], audio=WAVE[:1000])
    yield Event(text[middle:], ids[2:], logprobs=_logprobs(len(ids) - 2) if logprobs else None)
    if speech:
        yield Event("", [], audio=WAVE[1000:])
    yield Event("", [], reply)


def _asked(**fields):
    return read_chat({"messages": MESSAGES, **fields}, Defaults({}, 1))


def _whole(asked, tokenizer, events):
    choice, usage = Choice(0, asked, tokenizer), Usage(5, 1, 2)
    for event in events:
        choice.take(event)
        usage.add(event, event.reply)
    return completion_body(Heading("m"), [choice], usage)


def _stream(asked, tokenizer, events):
    stream = ChatStream(asked, Heading("m"), [Choice(0, asked, tokenizer)], Usage(5, 1, 2))
    text = stream.begin() + "".join(stream.add(0, event) for event in events) + stream.end()
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in text.strip().split("\n\n")[:-1]]


def test_text_whole_and_in_chunks(tokenizer):
    body = _whole(_asked(), tokenizer, _events(tokenizer, "A garden by the river"))
    parsed = chat.ChatCompletion.model_validate(body, strict=True)
    assert parsed.choices[0].message.content == "A garden by the river" and parsed.choices[0].finish_reason == "stop"
    chunks = _stream(_asked(stream=True), tokenizer, _events(tokenizer, "A garden by the river"))
    for chunk in chunks:
        chat.ChatCompletionChunk.model_validate(chunk, strict=True)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == "A garden by the river"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]


def test_usage(tokenizer):
    usage = _whole(_asked(), tokenizer, _events(tokenizer, "A garden"))["usage"]
    tokens = len(tokenizer.encode("A garden")) + 1 + STATS["frames"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, tokens, 5 + tokens)
    assert usage["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "image_tokens": 1,
        "audio_tokens": 2,
        "text_tokens": 2,
    }
    details = usage["completion_tokens_details"]
    assert (details["text_tokens"], details["audio_tokens"]) == (tokens - 2, 2)
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (3, 6)
    asked = _asked(stream=True, stream_options={"include_usage": True})
    chunks = _stream(asked, tokenizer, _events(tokenizer, "A garden"))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == usage
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    asked = _asked(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [c["usage"]["completion_tokens"] for c in _stream(asked, tokenizer, _events(tokenizer, "A garden"))]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == tokens


@pytest.mark.parametrize("modalities", [["text", "audio"], ["audio"]])
@pytest.mark.parametrize("form", ["wav", "pcm16"])
def test_speech_whole_and_in_chunks(tokenizer, modalities, form):
    fields = {"modalities": modalities, "audio": {"voice": "ethan", "format": form}}
    body = _whole(_asked(**fields), tokenizer, _events(tokenizer, "A garden by", True))
    message = chat.ChatCompletion.model_validate(body, strict=True).choices[0].message
    assert message.audio is not None and message.audio.transcript == "A garden by"
    assert body["choices"][0]["speech_finish_reason"] == "length"
    assert message.content == ("A garden by" if "text" in modalities else None)
    data = base64.b64decode(message.audio.data)
    assert data == pcm16(WAVE) if form == "pcm16" else data[44:] == pcm16(WAVE)
    chunks = _stream(_asked(**fields, stream=True), tokenizer, _events(tokenizer, "A garden by", True))
    assert [c["choices"][0].get("speech_finish_reason") for c in chunks[-2:]] == [None, "length"]
    sound, transcript, text = b"", "", ""
    for chunk in chunks:
        (choice,) = chunk["choices"]
        audio = choice["delta"].get("audio")
        text += choice["delta"].get("content") or ""
        if audio is not None:
            assert chunk["modality"] == "audio"
            transcript += audio["transcript"]
            piece = base64.b64decode(audio["data"])
            if form == "wav":
                with wave.open(BytesIO(piece)) as file:
                    piece = file.readframes(file.getnframes())
            sound += piece
    assert sound == pcm16(WAVE) and transcript == "A garden by"
    assert text == ("A garden by" if "text" in modalities else "")


def test_logprobs_without_the_end_mark(tokenizer):
    fields = {"logprobs": True, "top_logprobs": 2}
    body = _whole(_asked(**fields), tokenizer, _events(tokenizer, "A garden", logprobs=True))
    content = chat.ChatCompletion.model_validate(body, strict=True).choices[0].logprobs.content
    assert "".join(one.token for one in content) == "A garden"
    assert all(one.logprob == -0.5 and len(one.top_logprobs) == 2 for one in content)
    assert content[0].bytes == list(content[0].token.encode())
    chunks = _stream(_asked(**fields, stream=True), tokenizer, _events(tokenizer, "A garden", logprobs=True))
    streamed = [one for c in chunks for one in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == body["choices"][0]["logprobs"]["content"]


def test_reasoning(tokenizer):
    body = _whole(_asked(), tokenizer, _events(tokenizer, "A garden", reasoning="hm"))
    assert body["choices"][0]["message"]["reasoning_content"] == "hm"
    chunks = _stream(_asked(stream=True), tokenizer, _events(tokenizer, "A garden", reasoning="hm"))
    assert "hm" in [c["choices"][0]["delta"].get("reasoning_content") for c in chunks]
    assert "reasoning_content" not in _whole(_asked(), tokenizer, _events(tokenizer, "A"))["choices"][0]["message"]


def test_tools(tokenizer):
    text = 'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    fields = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    parsed = chat.ChatCompletion.model_validate(
        _whole(_asked(**fields), tokenizer, _events(tokenizer, text)), strict=True
    )
    (choice,) = parsed.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    assert [(c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [("f", '{"a": 1}')]
    chunks = _stream(_asked(**fields, stream=True), tokenizer, _events(tokenizer, text))
    calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [(c["index"], c["function"]["name"]) for c in calls] == [(0, "f")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    plain = _whole(_asked(), tokenizer, _events(tokenizer, text))["choices"][0]["message"]
    assert plain["content"] == text and "tool_calls" not in plain
