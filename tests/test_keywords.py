"""Settings are said once: keywords, types, defaults and meanings are those of the dataclasses."""

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, get_type_hints

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.settings import (
    GROUPS,
    NAMES,
    Ending,
    Keywords,
    Preparation,
    Sampling,
    Settings,
    Voice,
    meanings,
    parameters,
)

# Another value than the default for every setting.
OTHERS: dict[str, Any] = {
    "temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.25, "repetition_penalty": 1.5, "logprobs": 3,
    "speaker": "aiden", "speech_temperature": 0.25, "speech_top_k": 9, "speech_top_p": 0.5,
    "speech_repetition_penalty": 1.25, "max_frames": 11, "draft_tokens": "auto", "draft_tree": (2, 3),
    "draft_sampling": True, "max_new_tokens": 8, "stop": ("a", "b"), "stop_ids": (3, 5), "use_audio_in_video": True,
    "tools": [{"type": "function"}], "fps": 0.5, "media": {"max_pixels": 4096.0}, "thinking": False, "seed": 4,
}  # fmt: skip


def test_keywords_are_the_fields() -> None:
    types = [get_type_hints(kind) for kind in GROUPS.values()] + [{"seed": get_type_hints(Settings)["seed"]}]
    assert get_type_hints(Keywords) == {name: kind for group in types for name, kind in group.items()}
    assert {one.name for one in dataclasses.fields(Settings)} == {*GROUPS, "seed"}
    assert sum(map(len, types)) == len(NAMES), "no name twice"


def test_every_setting_has_a_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    known = meanings()
    assert list(known) == list(NAMES) and all(text.endswith(".") and "\n" not in text for text in known.values())
    assert known["max_frames"] == "Longest speech, in frames of 80 ms."
    monkeypatch.setattr(inspect, "getsource", lambda module: (_ for _ in ()).throw(OSError("no source")))
    assert meanings() == {}


def test_parameters_have_the_defaults() -> None:
    shown = {one.name: one.default for one in parameters()}
    assert shown == Settings().keywords() and set(shown) == set(NAMES) == set(OTHERS)
    assert shown["speaker"] == "ethan" and shown["max_frames"] == 4096 and shown["temperature"] == 0.0
    inspect.Signature(parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_keyword_reaches_its_field_and_comes_back(name: str) -> None:
    usual, made = Settings(), Settings.read({name: OTHERS[name]})
    assert made.keywords() == {**usual.keywords(), name: OTHERS[name]} != usual.keywords()
    assert Settings.read(made.keywords()) == made != usual


def test_all_settings_survive_json() -> None:
    stored = json.dumps(Settings.read(OTHERS).keywords())
    assert json.dumps(Settings.read(json.loads(stored)).keywords()) == stored


@pytest.mark.parametrize(
    "keywords, why",
    [
        ({"temprature": 1}, "no setting 'temprature'"),
        ({"temperature": -1}, "temperature is -1; it must be 0"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"speech_temperature": -1}, "speech_temperature is -1"),
        ({"speech_top_p": 2}, "speech_top_p is 2"),
        ({"max_frames": 0}, "max_frames is 0"),
        ({"speaker": 5}, "speaker is 5"),
        ({"draft_sampling": "no"}, "draft_sampling is 'no'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"use_audio_in_video": "yes"}, "use_audio_in_video is 'yes'"),
        ({"thinking": 1}, "thinking is 1"),
        ({"fps": 0}, "'fps' is 0"),
        ({"media": {"nframe": 8}}, "did you mean 'nframes'"),
        ({"media": {"nframes": 8}, "fps": 1.0}, "contradict"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be(keywords: Mapping[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        Settings.read(keywords)


def test_numbers_become_pythons() -> None:
    made = Settings.read(
        {"max_new_tokens": np.int64(3), "max_frames": np.int8(4), "speech_temperature": np.float32(0.5)}
    )
    assert made.ending == Ending(3) and made.voice == Voice(max_frames=4, speech_temperature=0.5)
    assert type(made.voice.speech_temperature) is float and type(made.ending.max_new_tokens) is int
    assert Preparation(thinking=np.bool_(True)).thinking is True  # type: ignore[arg-type]


def test_how_a_voice_draws() -> None:
    made = Voice(speech_temperature=0.5, speech_top_k=3, speech_top_p=0.25, speech_repetition_penalty=1.5)
    assert made.sampling == Sampling(0.5, 3, 0.25, repetition_penalty=1.5)
    assert Voice().sampling == Sampling(0.9, 50, repetition_penalty=1.05)


def test_settings_load_without_jax() -> None:
    code = "import sys, omni_jax.settings; print([m for m in ('jax', 'tyro') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
