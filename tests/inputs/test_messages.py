"""Checking messages: every accepted form of media, and one clear error for each thing that cannot be used."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.messages import MAX_CHARACTERS, MAX_PARTS, is_conversation, read_conversation, with_base
from omni_jax.inputs.options import Options

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


def test_null_is_absent():
    """As Arrow, pydantic and clients' dumps write it, at every level."""
    parts = [
        {"type": "text", "text": "hi", "image": None, "nframes": None},
        {"type": "image", "image": "a.png", "text": None, "url": None, "max_pixels": None},
        {"type": "image_url", "image_url": {"url": "b.png", "detail": None}, "text": None},
        {"type": "video", "video": "c.mp4", "fps": None, "sample_fps": None},
    ]
    call = {"id": "1", "type": "function", "index": None, "function": {"name": "f", "arguments": {"unit": None}}}
    conversation = read_conversation(
        [
            {"role": "user", "content": parts, "name": None, "refusal": None, "images": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "annotations": [], "audio": None},
        ]
    )
    assert [medium.source for medium in conversation.media] == ["a.png", "b.png", "c.mp4"]
    assert conversation.media[2].rate is None
    # What a tool is given is its own affair.
    assert conversation.messages[1]["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"unit": None}}}
    ]


def test_options_beside_media():
    parts = [
        {"type": "image", "image": "a.png", "min_pixels": 4096, "max_pixels": np.int64(65536)},
        {"type": "image_url", "image_url": {"url": "a.png"}, "resized_height": 64, "resized_width": 96.0},
        {"type": "video", "video": "b.mp4", "nframes": 8, "total_pixels": 1e6, "video_start": 0, "video_end": 2.5},
        {"type": "video_url", "video_url": "b.mp4", "fps": np.float32(2), "min_frames": 2, "max_frames": 9,
         "use_audio_in_video": np.bool_(True)},
        {"type": "audio", "audio": "c.wav", "audio_start": 0.5, "audio_end": np.int64(2)},
        {"type": "input_audio", "input_audio": {"data": PIXEL, "format": "wav"}, "audio_end": 3},
    ]  # fmt: skip
    media = read_conversation([{"role": "user", "content": parts}]).media
    assert [medium.options for medium in media] == [
        Options(min_pixels=4096, max_pixels=65536),
        Options(resized_height=64, resized_width=96),
        Options(nframes=8, total_pixels=1e6, video_start=0.0, video_end=2.5),
        Options(fps=2.0, min_frames=2, max_frames=9, use_audio_in_video=True),
        Options(audio_start=0.5, audio_end=2),
        Options(audio_end=3),
    ]
    numbers = [value for medium in media for value in vars(medium.options).values() if value is not None]
    assert all(type(value) in (int, float, bool) for value in numbers)


def test_own_options_win_and_replace_what_contradicts_them():
    call = Options(fps=1.0, max_pixels=9e4, resized_height=64, resized_width=64, max_frames=6)
    assert Options(nframes=4).over(call) == Options(
        nframes=4, max_pixels=9e4, resized_height=64, resized_width=64, max_frames=6
    )
    assert Options(max_pixels=5e4).over(call) == Options(fps=1.0, max_pixels=5e4, max_frames=6)
    assert Options(fps=3.0, max_frames=8).over(call).fps == 3.0
    assert Options().over(call) == call
    assert Options(min_pixels=1e5).over(Options(max_pixels=5e4)) == Options(min_pixels=1e5)
    assert Options(min_pixels=1e4).over(Options(max_pixels=5e4)) == Options(min_pixels=1e4, max_pixels=5e4)
    assert Options(max_frames=2).over(Options(min_frames=4, fps=1.0)) == Options(max_frames=2, fps=1.0)


def test_frames_one_by_one():
    array = np.zeros((4, 4, 3), np.uint8)
    frames = ["a.png", f"data:image/png;base64,{PIXEL}", array, {"bytes": None, "path": "b.png"}, "file:///c.png"]
    listed = {"type": "video", "video": frames, "sample_fps": 4}
    url = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{PIXEL},{PIXEL}"}, "fps": 3}
    media = read_conversation([{"role": "user", "content": [listed, url]}]).media
    decoded = b"not really a picture"
    assert media[0].source == ["a.png", decoded, array, "b.png", "/c.png"] and media[0].rate == 4
    assert media[1].source == [decoded, decoded] and media[1].rate == 3


def test_media_of_datasets():
    parts = [
        {"type": "image", "image": {"bytes": b"GIF", "path": "a.gif"}},
        {"type": "audio", "audio": {"bytes": None, "path": "a.wav"}},
    ]
    media = read_conversation([{"role": "user", "content": parts}]).media
    assert [medium.source for medium in media] == [b"GIF", "a.wav"]


@pytest.mark.parametrize("beside", [{"path": "a.wav"}, {"path": "a.wav", "bytes": None}, {}])
def test_decoded_sounds_of_datasets(beside):
    array = np.zeros(8)
    part = {"type": "audio", "audio": {"array": array, "sampling_rate": 16_000, **beside}}
    (medium,) = read_conversation([{"role": "user", "content": [part]}]).media
    assert medium.source is array and medium.rate == 16_000


def test_empty_values_beside_a_text_and_null_arguments():
    part = {"type": "text", "text": "hi", "annotations": [], "logprobs": None}
    calls = [{"name": "f", "arguments": None}, {"id": "1", "function": {"name": "g", "arguments": None}}]
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "tool_calls": calls}]
    said, answer = read_conversation(messages).messages
    assert said["content"] == [{"type": "text", "text": "hi"}]
    assert answer["tool_calls"] == [
        {"name": "f", "arguments": {}},
        {"id": "1", "function": {"name": "g", "arguments": {}}},
    ]


def test_paths_are_relative_to_the_file_that_names_them(tmp_path):
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}},
        {"type": "video_url", "video_url": "file:c.mp4"},
        {"type": "audio", "path": "12:30.wav"},
        {"type": "video", "video": ["1.jpg", "/2.jpg"]},
        {"type": "image", "image": {"path": "d.png"}},
        {"type": "image", "image": "/e.png"},
        {"type": "image", "image": "~/f.png"},
        {"type": "image", "image": f"data:image/png;base64,{PIXEL}"},
        {"type": "input_audio", "input_audio": {"data": PIXEL}},
        {"type": "image", "image": b"GIF"},
    ]
    messages = {"messages": [{"role": "user", "content": parts}]}
    before = repr(messages)
    based = with_base(messages, tmp_path)
    expected = [
        *(str(tmp_path / name) for name in ("a.png", "b.png", "c.mp4", "12:30.wav")),
        [str(tmp_path / "1.jpg"), "/2.jpg"],
        str(tmp_path / "d.png"),
        "/e.png",
        str(Path.home() / "f.png"),
        b"not really a picture",
        b"not really a picture",
        b"GIF",
    ]
    assert [medium.source for medium in read_conversation(based).media] == expected
    assert repr(messages) == before
    assert with_base("no messages", tmp_path) == "no messages" and with_base(messages, None) is messages


def test_messages_in_an_object():
    messages = [{"role": "user", "content": "a"}]
    asked = {"messages": messages, "tools": [{"name": "f"}], "stream": None}
    conversation = read_conversation(asked)
    assert conversation.messages == messages and conversation.tools == [{"name": "f"}]
    assert read_conversation({"messages": messages}, [{"name": "g"}]).tools == [{"name": "g"}]
    assert is_conversation(asked) and not is_conversation([asked, asked])


def test_numbers_of_numpy_in_tools():
    schema = {"name": "f", "default": np.int64(3), "maximum": np.float32(0.5)}
    assert read_conversation([{"role": "user", "content": "a"}], [schema]).tools == [
        {"name": "f", "default": 3, "maximum": 0.5}
    ]
