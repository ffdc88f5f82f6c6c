"""Messages, parts, options and tools that cannot be used, each named with what to do instead."""

from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.messages import read_conversation, with_base
from tests.bad_inputs.case import Case

DEEP: dict = {}
for _ in range(600):
    DEEP = {"type": "object", "properties": DEEP}
LOOP: dict = {}
LOOP["self"] = LOOP
HI = [{"role": "user", "content": "hi"}]


def _messages(name: str, messages: Any, *words: str, tools: Any = None) -> Case:
    return Case(f"messages: {name}", lambda *_: read_conversation(messages, tools), words, InputError)


def _beside(name: str, key: Any, value: Any, *words: str) -> Case:
    """A key beside the content of a message."""
    return _messages(name, [{"role": "user", "content": "hi", key: value}], "message 0", *words)


def _part(name: str, part: Any, *words: str) -> Case:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]
    return _messages(name, messages, "message 0, part 1", *words)


def _video(name: str, options: dict, *words: str) -> Case:
    return _part(name, {"type": "video", "video": "a.mp4", **options}, *words)


def _prepare(name: str, messages: Any, *words: str, **settings: Any) -> Case:
    """Through the loaded model, as users call it."""
    return Case(f"prepare: {name}", lambda _, world: world.omni.prepare(messages, **settings), words, InputError)


def _processor(name: str, words: tuple[str, ...], **settings: Any) -> Case:
    """Through the processor, as a program calls it that has no model."""
    return Case(f"processor: {name}", lambda _, world: world.omni.processor.prepare(HI, **settings), words, InputError)


def _raw(name: str, prompts: Any, *words: str, **settings: Any) -> Case:
    def act(_: Any, world: Any) -> None:
        world.omni.processor.prepare_text(prompts, **settings)

    return Case(f"raw prompts: {name}", act, words, InputError)


CASES = [
    _beside("a picture beside the content", "image", "a.png", "'image'", "in 'content'"),
    _beside("pictures beside the content", "images", ["a.png"], "'images'", "in 'content'"),
    _beside("an address beside the content", "image_url", "a.png", "'image_url'", "in 'content'"),
    _beside("videos beside the content", "videos", ["a.mp4"], "'videos'", "in 'content'"),
    _beside("an option beside the content", "max_pixels", 4096, "'max_pixels'", "in 'content'"),
    _beside("a misspelt key", "tool_call", [1], "'tool_call'", "did you mean 'tool_calls'"),
    _beside("calls of an older kind", "function_call", {"name": "f"}, "'function_call'", "'tool_calls'"),
    _beside("a text beside the content", "text", "more", "'text'", "'content'"),
    _beside("a key that is a number", 1, "x", "unknown key 1", "there are role, content"),
    _beside("a key of another program", "weight", 0.5, "'weight'", "there are role, content"),
    _messages("roles of another form", [{"from": "human", "value": "hi"}], "message 0 has the role None", "roles are"),
    _messages(
        "settings beside the messages", {"messages": HI, "temperature": 0}, "'temperature'", "arguments of the call"
    ),
    _messages("tools twice", {"messages": HI, "tools": []}, "tools are stated twice", "leave one out", tools=[]),
    _messages("an object without messages", {"prompt": "hi"}, "type dict", "pass a list"),
    _messages("messages null", {"messages": None}, "NoneType", "pass a list"),
    _messages(
        "half of a surrogate pair", [{"role": "user", "content": "a\ud800"}], "surrogate", "character 1", "remove"
    ),
    _messages("half a pair in a name", [{"role": "user", "content": "a", "name": "\udc00"}], "'name'", "surrogate"),
    _part("half a pair in a part", {"type": "text", "text": "\udfff"}, "surrogate"),
    _messages("schemas 600 deep", HI, "tool 0", "nested too deep", "100 levels", tools=[DEEP]),
    _messages("a schema that holds itself", HI, "tool 0", "nested too deep", tools=[LOOP]),
    _messages("names that are numbers", HI, "tool 0", "key 1 of type int", tools=[{"properties": {1: {}}}]),
    _messages("names that are null", HI, "tool 0", "NoneType", tools=[{None: {}}]),
    _messages("NaN in a schema", HI, "tool 0", "plain values", tools=[{"maximum": float("nan")}]),
    _messages("a number of 5,000 digits", HI, "tool 0", "digits", tools=[{"maximum": 10**5000}]),
    _messages("an array in a schema", HI, "tool 0", "ndarray", "plain values", tools=[{"enum": np.zeros(2)}]),
    _messages("half a pair in a schema", HI, "tool 0", "surrogate", tools=[{"name": "\ud800"}]),
    _messages(
        "arguments 600 deep",
        [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": DEEP}]}],
        "tool call 0",
        "nested too deep",
    ),
    _part(
        "an unknown key of a source",
        {"type": "image", "image": {"path": "a.png", "byte": b"x"}},
        "the image is a dict with the unknown key 'byte'",
        "did you mean 'bytes'",
    ),
    _part(
        "a rate twice",
        {"type": "audio", "audio": {"array": np.zeros(9), "sampling_rate": 8000}, "sampling_rate": 16_000},
        "'sampling_rate' is stated twice",
        "leave one out",
    ),
    _part("an empty text part", {"type": "text", "text": None, "annotations": []}, "no 'text'"),
    _part("a text with an option", {"type": "text", "text": "hi", "max_pixels": 9}, "unknown key 'max_pixels'"),
    _part("a part of null", None, "NoneType"),
    _part("all keys null", {"type": "text", "text": None}, "has no 'text'"),
    _part("a medium null", {"type": "image", "image": None}, "exactly one of"),
    _part("type null", {"type": None, "text": "hi"}, "type None", "types are text"),
    _part("an option of videos at a picture", {"type": "image", "image": "a", "nframes": 4}, "'nframes'", "video"),
    _part(
        "an option of sounds at a video", {"type": "video", "video": "a", "audio_start": 1}, "'audio_start'", "audio"
    ),
    _part("a rate of frames at a sound", {"type": "audio", "audio": "a", "fps": 2}, "'fps'", "video"),
    _part("a misspelt option", {"type": "image", "image": "a", "max_pixel": 9}, "did you mean 'max_pixels'"),
    _part("a key beside an address", {"type": "image_url", "image_url": "a", "detail": "low"}, "'detail'"),
    _part("a key beside sound data", {"type": "input_audio", "input_audio": {"data": ""}, "rate": 1}, "'rate'"),
    _part("a source that names nothing", {"type": "image", "image": {"uri": "a"}}, "'bytes' and 'path'"),
    _part(
        "frames at a distance", {"type": "video", "video": ["a.jpg", "http://b/c.jpg"]}, "frame 1", "nothing is fetched"
    ),
    _part("a broken frame", {"type": "video", "video": "data:video/jpeg;base64,QUJD,@"}, "frame 1", "base64"),
    _part("an empty frame", {"type": "video", "video": [""]}, "frame 0", "empty"),
    _part("stored far away", {"type": "image", "image": "s3://a/b.png"}, "nothing is fetched"),
    _video("two ways to sample", {"fps": 2, "nframes": 8}, "'nframes' and 'fps'", "one of them"),
    _video("two rates", {"fps": 2, "sample_fps": 8}, "'sample_fps'", "at 'fps'"),
    _video("a height alone", {"resized_height": 64}, "'resized_height' and 'resized_width'", "both"),
    _video("limits exchanged", {"min_pixels": 9000, "max_pixels": 8000}, "'min_pixels'", "9000", "exchange"),
    _video("frames exchanged", {"min_frames": 9, "max_frames": 8}, "'min_frames'", "exchange"),
    _video("a span backwards", {"video_start": 3, "video_end": 2}, "'video_end' of 2 s", "not after"),
    _video("an empty span", {"video_end": 0}, "'video_end' is 0", "positive"),
    _video("a start below zero", {"video_start": -1}, "'video_start' is -1", "positive"),
    _video("half a frame", {"nframes": 2.5}, "'nframes' is 2.5", "whole"),
    _video("frames as text", {"nframes": "8"}, "'nframes' is '8'"),
    _video("a truth for a number", {"nframes": True}, "'nframes' is True"),
    _video("a number for a truth", {"use_audio_in_video": 1}, "'use_audio_in_video' is 1", "True or False"),
    _video("pixels without end", {"max_pixels": float("inf")}, "'max_pixels' is inf"),
    _video("a number of 400 digits", {"max_pixels": 10**400}, "more than 12 digits"),
    _video("a list for a number", {"fps": [2]}, "'fps' is of type list"),
    _prepare("a call's misspelt option", HI, "'max_pixel'", "did you mean 'max_pixels'", media={"max_pixel": 1}),
    _processor("room as text", ("max_new_tokens is 'x'", "0 or more"), max_new_tokens="x"),
    _processor("room below zero", ("max_new_tokens is -5", "0 or more"), max_new_tokens=-5),
    _processor("thinking as text", ("enable_thinking is 'no'", "True or False"), enable_thinking="no"),
    _processor("a turn to open as text", ("add_generation_prompt is 'no'", "True"), add_generation_prompt="no"),
    _processor("hearing as text", ("use_audio_in_video is 'no'", "True or False"), use_audio_in_video="no"),
    _raw("a number", 5, "prompts is 5", "a text, or a list of them"),
    _raw("a list of numbers", [5], "a prompt is 5", "a text, or a list of them"),
    _raw("room as text", "hi", "max_new_tokens is 'x'", "0 or more", max_new_tokens="x"),
    _prepare("options as text", HI, "media is of type str", "dict", media="nframes=8"),
    _prepare("a call's rate of zero", HI, "the call: 'fps' is 0", "positive", fps=0),
    _prepare("a row among objects", [{"messages": HI}, {"messages": []}], "row 1", "empty"),
    Case(
        "messages: a stranger's home",
        lambda folder, _: with_base([{"role": "user", "content": [{"type": "image", "image": "~nobody-x/a"}]}], folder),
        ("~nobody-x/a", "home directory"),
    ),
    Case(
        "messages: a path that is not there, beside its file",
        lambda folder, world: world.omni.prepare(
            with_base([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], Path("/no/such"))
        ),
        ("/no/such/a.png", "no such file"),
    ),
]
