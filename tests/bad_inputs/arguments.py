"""Arguments of the public functions that cannot be meant: refused at the call, with their name and what to give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax import load
from omni_jax.decode.prompt import Prompt
from omni_jax.errors import InputError
from omni_jax.inspection import Inspect, inspect
from tests.bad_inputs.case import Case

MESSAGES = [{"role": "user", "content": "Hi"}]
DOORS = ("generate", "stream", "generate_many")


def _asked(name: str, settings: dict[str, Any], *words: str, doors: tuple[str, ...] = DOORS) -> list[Case]:
    """The same wrong setting at several doors. Nothing is iterated over: the call itself must refuse it."""

    def act(door: str) -> Callable[[Path, Any], Any]:
        messages = [MESSAGES] if door == "generate_many" else MESSAGES
        return lambda _, world: getattr(world.omni, door)(messages, **settings)

    return [Case(f"{door}: {name}", act(door), words, InputError) for door in doors]


def _spoken(name: str, settings: dict[str, Any], *words: str) -> list[Case]:
    return _asked(name, {"speech": True, **settings}, *words, doors=DOORS)


def _one(name: str, settings: dict[str, Any], *words: str) -> list[Case]:
    return _asked(name, settings, *words, doors=("generate",))


def _model(name: str, act: Callable[[Any], Any], *words: str) -> Case:
    return Case(name, lambda _, world: act(world.omni), words, InputError)


def _loaded(name: str, settings: dict[str, Any], *words: str) -> Case:
    return Case(f"load: {name}", lambda _, world: load(world.converted, **settings), words, InputError)


def _inspected(name: str, settings: dict[str, Any], *words: str) -> Case:
    return Case(f"inspect: {name}", lambda _, w: inspect(Inspect(w.converted, **settings)), words, InputError)


CASES = [
    # Names that other libraries use.
    *_asked("max_tokens", {"max_tokens": 5}, "max_tokens", "called max_new_tokens"),
    *_one("max_completion_tokens", {"max_completion_tokens": 5}, "called max_new_tokens"),
    *_one("do_sample", {"do_sample": True}, "do_sample", "temperature decides"),
    *_one("presence_penalty", {"presence_penalty": 0.5}, "repetition_penalty"),
    *_one("frequency_penalty", {"frequency_penalty": 0.5}, "repetition_penalty"),
    *_one("num_return_sequences", {"num_return_sequences": 2}, "called n here"),
    *_asked("stop_strings", {"stop_strings": "a"}, "called stop here"),
    *_one("stop_token_ids", {"stop_token_ids": [1]}, "called stop_ids here"),
    *_one("top_logprobs", {"top_logprobs": 5}, "called logprobs here"),
    *_one("enable_thinking", {"enable_thinking": False}, "called thinking here"),
    *_one("voice", {"voice": "ethan"}, "called speaker here"),
    *_one("a slip", {"temprature": 1.0}, "temprature", "did you mean temperature?"),
    *_one("something else", {"zzz": 1}, "generate has no 'zzz'"),
    *_asked("n", {"n": 2}, "generate gives several", doors=("stream", "generate_many")),
    Case("load: torch_dtype", lambda _, w: load(w.converted, torch_dtype="auto"), ("called dtype here",), InputError),  # type: ignore[call-arg]
    _model("prepare: enable_thinking", lambda omni: omni.prepare(MESSAGES, enable_thinking=True), "called thinking"),
    # Where replies end.
    *_asked("no tokens", {"max_new_tokens": 0}, "max_new_tokens is 0", "at least one token"),
    *_asked("half a token", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    *_one("tokens as text", {"max_new_tokens": "5"}, "max_new_tokens is '5'"),
    *_one("true tokens", {"max_new_tokens": True}, "max_new_tokens is True"),
    *_asked("10^12 tokens", {"max_new_tokens": 10**12}, "max_new_tokens is 1000000000000", "context of"),
    *_one("tokens of 5000 digits", {"max_new_tokens": -(10**5000)}, "max_new_tokens is of type int"),
    *_asked("stop ids as bytes", {"stop_ids": b"ab"}, "stop_ids is b'ab'", "list of token ids"),
    *_one("stop ids as text", {"stop_ids": "ab"}, "stop_ids is 'ab'", "list of token ids"),
    *_one("one stop id", {"stop_ids": 5}, "stop_ids is 5", "list of token ids"),
    *_one("stop ids by name", {"stop_ids": {1: 2}}, "stop_ids", "list of token ids"),
    *_one("true stop ids", {"stop_ids": [True]}, "stop id True", "no whole number", "from 0 to"),
    *_one("a table of stop ids", {"stop_ids": np.ones((2, 2), int)}, "stop_ids", "list of token ids"),
    *_asked("a negative stop id", {"stop_ids": [-1]}, "stop id -1", "outside the vocabulary"),
    *_asked("an empty stop string", {"stop": ""}, "stop holds an empty text"),
    *_one("a stop string as bytes", {"stop": b"ab"}, "stop is b'ab'", "list of texts"),
    *_one("stop strings and a number", {"stop": ["a", 5]}, "stop holds 5", "list of texts"),
    *_one("half a character", {"stop": "\ud800"}, "surrogate"),
    *_asked("a broken character", {"stop": "a\ufffd"}, "stop", "U+FFFD", "leave it out"),
    *_asked("an endless stop string", {"stop": ["a" * 10_001]}, "10,001 characters", "at most 10,000"),
    *_one("a whole float of tokens", {"max_new_tokens": 4.0}, "max_new_tokens is 4.0", "a whole number"),
    *_one("true replies", {"n": True, "temperature": 1.0}, "n is True", "a whole number"),
    *_one("10^12 replies", {"n": 10**12, "temperature": 1.0}, "1,000,000,000,000 rows", "have fewer"),
    *_asked("a control token as stop string", {"stop": ["<|im_end|>"]}, "<|im_end|> is no text", "stop_ids=["),
    # How many, and which.
    *_one("no reply", {"n": 0, "temperature": 1.0}, "n is 0", "at least one reply"),
    *_one("three greedy replies", {"n": 3}, "n is 3", "greedy replies are all the same"),
    *_asked("seed as bytes", {"seed": b"\x01"}, "seed is b'\\x01'", "whole number"),
    *_one("seed as text", {"seed": "7"}, "seed is '7'", "whole number"),
    *_asked("a negative seed", {"seed": -1}, "seed is -1", "2^63"),
    *_asked("half a seed", {"seed": 0.5}, "seed is 0.5", "whole number"),
    *_one("a nest of seeds", {"seed": [[1, 2]]}, "seed is [1, 2]", "whole number"),
    *_one("a set of seeds", {"seed": {5}}, "seed is {5}", "no order"),
    *_one("two seeds for one", {"seed": [1, 2]}, "2 seeds for 1"),
    # How tokens are drawn.
    *_asked("10^400 degrees", {"temperature": 10**400}, "temperature is", "1e+06"),
    *_asked("hardly any temperature", {"temperature": 1e-44}, "temperature is 1e-44", "1e-06"),
    *_one("temperature beyond float32", {"temperature": 1e39}, "temperature is 1e+39", "1e+06"),
    *_one("no number of degrees", {"temperature": float("nan")}, "temperature is nan"),
    *_one("temperature as an array", {"temperature": np.ones(2)}, "temperature is", "a number"),
    *_asked("hardly any mass", {"top_p": 1e-44}, "top_p is 1e-44", "1e-06"),
    *_one("a penalty of nothing", {"repetition_penalty": 1e-44}, "repetition_penalty is 1e-44", "0.001"),
    *_one("an infinite penalty", {"repetition_penalty": float("inf")}, "repetition_penalty is inf", "1000"),
    *_one("a complex number", {"min_p": 1j}, "min_p is 1j", "a number"),
    *_one("10^400 candidates", {"top_k": 10**400}, "top_k is", "positive count"),
    *_asked("log-probabilities, yes", {"logprobs": True}, "logprobs is True", "0 to 20"),
    *_one("too many log-probabilities", {"logprobs": 21}, "logprobs is 21", "0 to 20"),
    # True or False.
    *_asked("speech as text", {"speech": "no"}, "speech is 'no'", "True or False", doors=DOORS),
    *_one("speech as a number", {"speech": 1}, "speech is 1", "True or False"),
    *_one("use_audio_in_video as text", {"use_audio_in_video": "yes"}, "use_audio_in_video is 'yes'"),
    *_asked("thinking as text", {"thinking": "no"}, "thinking is 'no'", "True or False"),
    *_asked("draft_sampling as text", {"draft_sampling": ""}, "draft_sampling is ''", "True or False"),
    # Media, before any conversation comes.
    *_asked("5 media options", {"media": 5}, "media is of type int", doors=("generate_many",)),
    *_asked("a strange media option", {"media": {"foo": 1}}, "foo", doors=("generate_many",)),
    # Settings of speech are checked without it too.
    *_asked("a silent speaker of 5", {"speaker": 5}, "speaker is 5", "give a name", doors=DOORS),
    *_asked("silent degrees", {"speech_temperature": "x"}, "speech_temperature is 'x'", doors=DOORS),
    *_asked(
        "10^12 silent frames", {"max_frames": 10**12}, "max_frames is a setting of speech", "leave it out", doors=DOORS
    ),
    # Speech.
    *_spoken("no speaker", {"speaker": None}, "speaker is None", "give a name"),
    *_spoken("a speaker as bytes", {"speaker": b"ethan"}, "speaker is b'ethan'", "give a name"),
    *_spoken("a stranger", {"speaker": "nobody"}, "no speaker 'nobody'", "aiden"),
    *_spoken("two speakers for one", {"speaker": ["ethan", "aiden"]}, "2 speakers for 1"),
    *_spoken("no frames", {"max_frames": 0}, "max_frames is 0"),
    *_spoken(
        "10^12 frames", {"max_frames": 10**12}, "max_frames is 1000000000000", "context ends at 32768", "at most 32768"
    ),
    *_spoken("10^400 degrees of speech", {"speech_temperature": 10**400}, "speech_temperature", "1e+06"),
    # What is asked about.
    _model("logits: messages", lambda omni: omni.logits(MESSAGES), "prepared batch", "prepare(messages)"),
    _model(
        "vocode: 10^11 frames",
        lambda omni: omni.vocode(np.broadcast_to(np.zeros((), np.int32), (16, 10**11))),
        "the sound of 100,000,000,000 frames",
        "fewer at a time",
    ),
    _model("generate_many: a number", lambda omni: omni.generate_many(5), "conversations is 5", "list or iterator"),
    _model("generate_many: text", lambda omni: omni.generate_many("Hi"), "conversations is 'Hi'", "list or iterator"),
    _model("generate_many: one", lambda omni: omni.generate_many(MESSAGES), "a single one", "ask generate"),
    _model("generate_many: no slots", lambda omni: omni.generate_many([], slots=0), "slots is 0", "at least one"),
    _model(
        "generate_many: 10^9 slots", lambda omni: omni.generate_many([], slots=10**9), "1,000,000,000 rows", "slots"
    ),
    _model("prompt: messages", lambda _: Prompt(MESSAGES, 0, 5), "prepared batch"),  # type: ignore[arg-type]
    # Loading and looking.
    Case("load: nothing", lambda *_: load(None), ("the model", "NoneType", "give a path"), InputError),  # type: ignore[arg-type]
    _loaded("a mesh of 4", {"mesh": 4}, "mesh is 4", "expert=4"),
    _loaded("5 parts", {"parts": 5}, "parts is 5", "('thinker',)"),
    _loaded("parts as text", {"parts": "thinker"}, "parts is 'thinker'", "('thinker',)"),
    _loaded("part number 5", {"parts": [5]}, "parts holds 5", "('thinker',)"),
    _loaded("a type of NumPy", {"dtype": np.float32}, "dtype is", "float32"),
    _loaded("half precision", {"dtype": "float16"}, "dtype is 'float16'", "bfloat16"),
    _inspected("a context of -5", {"context": -5}, "--context is -5", "at least 1"),
    _inspected("no conversations", {"batch": 0}, "--batch is 0", "at least 1"),
]
