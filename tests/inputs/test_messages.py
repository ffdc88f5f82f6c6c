"""Checking messages: every accepted form of media, and one clear error for each thing that cannot be used."""

import base64
import json

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.messages import MAX_CHARACTERS, MAX_PARTS, is_conversation, read_conversation

PIXEL = base64.b64encode(b"not really a picture").decode()


@pytest.mark.parametrize(
    "part, kind, source",
    [
        ({"type": "image", "image": "a.png"}, "image", "a.png"),
        ({"type": "image", "path": "a.png"}, "image", "a.png"),
        ({"type": "image", "base64": PIXEL}, "image", b"not really a picture"),
        ({"type": "image", "url": "file:///tmp/a%20b.png"}, "image", "/tmp/a b.png"),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "low"}}, "image",
         b"not really a picture"),
        ({"type": "image_url", "image_url": "a.png"}, "image", "a.png"),
        ({"type": "audio_url", "audio_url": {"url": f"data:;base64,{PIXEL}"}}, "audio", b"not really a picture"),
        ({"type": "audio_url", "audio_url": {"url": "data:audio/wav,%52IFF"}}, "audio", b"RIFF"),
        ({"type": "video_url", "video_url": {"url": "C:\\clip.mp4"}}, "video", "C:\\clip.mp4"),
        ({"type": "input_audio", "input_audio": {"data": PIXEL, "format": "wav"}}, "audio", b"not really a picture"),
        ({"type": "input_audio", "input_audio": {"data": f"data:;base64,{PIXEL}"}}, "audio", b"not really a picture"),
        ({"type": "audio", "audio": b"RIFF"}, "audio", b"RIFF"),
    ],
)  # fmt: skip
def test_forms_of_media(part, kind, source):
    conversation = read_conversation([{"role": "user", "content": [part]}])
    (medium,) = conversation.media
    assert (medium.kind, medium.source, medium.rate) == (kind, source, None)
    assert conversation.messages[0]["content"] == [{"type": kind, kind: ""}]
    assert medium.where == "message 0, part 0"


def test_media_are_listed_in_order_with_their_rates():
    sound, clip = np.zeros(800, np.float32), np.zeros((2, 4, 4, 3), np.uint8)
    conversation = read_conversation(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "audio", "audio": sound, "sampling_rate": 16000}]},
            {"role": "tool", "content": [{"type": "text", "text": "t"}, {"type": "video", "video": clip, "fps": 2.5}]},
        ]
    )
    assert [(m.kind, m.rate, m.where) for m in conversation.media] == [
        ("audio", 16000, "message 1, part 0"),
        ("video", 2.5, "message 2, part 1"),
    ]
    assert conversation.media[0].source is sound and conversation.media[1].source is clip


def test_callers_messages_are_left_alone():
    messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    before = json.dumps(messages)
    assert read_conversation(messages).messages[0]["content"] is not messages[0]["content"]
    assert json.dumps(messages) == before


def test_one_conversation_or_several():
    assert is_conversation([{"role": "user"}]) and is_conversation([]) and is_conversation("text")
    assert not is_conversation([[{"role": "user"}]])


def of_part(part):
    return [{"role": "user", "content": [{"type": "text", "text": "ok"}, part]}]


CYCLE = {}
CYCLE["self"] = CYCLE
BAD_MESSAGES = {
    "a string": ("hello", "messages of type str"),
    "one message": ({"role": "user", "content": "a"}, "messages of type dict"),
    "nothing": (None, "messages of type NoneType"),
    "no messages": ([], "messages is empty"),
    "message as string": (["hello"], "message 0 is of type str"),
    "role misspelt": ([{"role": "users", "content": "a"}], "message 0 has the role 'users'; roles are system, user"),
    "no role": ([{"content": "a"}], "message 0 has the role None"),
    "role of another type": ([{"role": ["user"], "content": "a"}], "message 0 has the role"),
    "no content": ([{"role": "user"}], "message 0 has no 'content'"),
    "content null": ([{"role": "user", "content": None}], "message 0 has no 'content'"),
    "content misspelt": ([{"role": "user", "contents": "a"}], "message 0 has no 'content'"),
    "content a number": ([{"role": "user", "content": 3}], "message 0: 'content' is of type int"),
    "part a string": (of_part("hello"), "message 0, part 1 is of type str"),
    "part without type": (of_part({"image": "a.png"}), "part 1 has the type None"),
    "part of unknown type": (of_part({"type": "picture", "picture": "a"}), "part 1 has the type 'picture'; types are"),
    "text missing": (of_part({"type": "text"}), "part 1 has no 'text'"),
    "text a number": (of_part({"type": "text", "text": 1}), "part 1: 'text' is of type int"),
    "image missing": (of_part({"type": "image"}), "give exactly one of"),
    "image twice": (of_part({"type": "image", "image": "a", "path": "b"}), "give exactly one of"),
    "image under another name": (of_part({"type": "image", "picture": "a.png"}), "unknown key 'picture'"),
    "unknown setting": (of_part({"type": "video", "video": "a.mp4", "frames": 8}), "did you mean 'nframes'"),
    "rate of an image": (of_part({"type": "image", "image": "a.png", "fps": 2}), "unknown key 'fps'"),
    "rate zero": (of_part({"type": "video", "video": "a.mp4", "fps": 0}), "'fps' is 0; give a positive"),
    "rate not a number": (of_part({"type": "audio", "audio": "a", "sampling_rate": "16k"}), "'sampling_rate' is '16k'"),
    "rate NaN": (of_part({"type": "video", "video": "a.mp4", "fps": float("nan")}), "'fps' is nan"),
    "empty path": (of_part({"type": "image", "image": ""}), "the image is an empty string"),
    "http": (of_part({"type": "image", "image": "https://a.org/b.png"}), "remote URL; nothing is fetched"),
    "http in OpenAI's form": (of_part({"type": "image_url", "image_url": {"url": "HTTP:\\\\a.org"}}), "remote URL"),
    "ftp": (of_part({"type": "video_url", "video_url": {"url": "ftp://a.org/b.mp4"}}), "remote URL"),
    "concat": (of_part({"type": "video", "video": "concat:a.mp4|b.mp4"}), "remote URL"),
    "no url": (of_part({"type": "image_url", "image_url": {}}), "'image_url' has no 'url'"),
    "no image_url": (of_part({"type": "image_url", "url": "a"}), "part 1 has no 'image_url'"),
    "url a number": (of_part({"type": "image_url", "image_url": {"url": 3}}), "the URL is of type int"),
    "broken base64": (of_part({"type": "image", "image": "data:image/png;base64,@@@"}), "base64 data cannot be"),
    "cut base64": (of_part({"type": "image", "base64": "abc"}), "base64 data cannot be decoded"),
    "data without comma": (of_part({"type": "image", "image": "data:image/png;base64"}), "has no comma"),
    "audio without data": (of_part({"type": "input_audio", "input_audio": {"format": "wav"}}), "has no 'data'"),
    "audio as a string": (of_part({"type": "input_audio", "input_audio": "a"}), "'input_audio' is of type str"),
    "audio without header": (of_part({"type": "input_audio", "input_audio": {"data": "A", "format": "pcm16"}}), "rate"),
    "calls not a list": ([{"role": "assistant", "content": "", "tool_calls": {}}], "'tool_calls' is of type dict"),
    "call without name": ([{"role": "assistant", "tool_calls": [{"arguments": {}}]}], "call 0 has no function name"),
    "call without arguments": ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "call 0 has no 'arguments'"),
    "call of another type": ([{"role": "assistant", "tool_calls": ["f"]}], "call 0 has no function name"),
    "reasoning a list": ([{"role": "assistant", "content": "", "thinking": ["a"]}], "'thinking' is of type list"),
    "call not JSON": (
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": np.zeros(1)}}]}],
        "tool call 0 cannot be written as JSON",
    ),
    "too many parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}] * (MAX_PARTS + 1)}], "1025 parts"),
    "too long": ([{"role": "user", "content": "a" * MAX_CHARACTERS}], "at most 8000000 are accepted"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(name):
    messages, message = BAD_MESSAGES[name]
    with pytest.raises(InputError, match=message):
        read_conversation(messages)


@pytest.mark.parametrize(
    "tools, message",
    [
        ({"name": "f"}, "tools of type dict"),
        (["f"], "tool 0 is of type str"),
        ([{"name": "f"}, {"default": object()}], "tool 1 cannot be written as JSON"),
        ([CYCLE], "tool 0 cannot be written as JSON"),
    ],
)
def test_bad_tools(tools, message):
    with pytest.raises(InputError, match=message):
        read_conversation([{"role": "user", "content": "a"}], tools)


def test_content_may_be_absent_beside_tool_calls():
    conversation = read_conversation(
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}]
    )
    assert conversation.messages[0]["content"] == ""


@pytest.mark.parametrize(
    "message", [{"reasoning_content": "r", "thinking": "t"}, {"thinking": "r"}, {"reasoning": "r"}]
)
def test_names_of_reasoning(message):
    conversation = read_conversation([{"role": "assistant", "content": "a", "name": "bot"} | message])
    assert conversation.messages == [{"role": "assistant", "content": "a", "reasoning_content": "r", "name": "bot"}]
