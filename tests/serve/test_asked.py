"""Bodies of requests: every field reaches the setting that it means, and what cannot be obeyed is refused by name."""

import time

import pytest

from omni_jax.serve.asked import Defaults, check_model, read_chat
from omni_jax.serve.asked_audio import read_speech, read_transcription
from omni_jax.serve.errors import RequestError

END = 99
DEFAULTS = Defaults({"max_new_tokens": 77, "temperature": 0.5, "speaker": "ethan"}, END)
MESSAGES = [{"role": "user", "content": "Hello"}]


def _asked(**fields):
    return read_chat({"messages": MESSAGES, **fields}, DEFAULTS)


def _refused(**fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        _asked(**fields)
    return caught.value


def test_what_is_not_stated_is_as_the_server_has_it():
    asked = _asked()
    assert asked.settings.ending.max_new_tokens == 77 and not asked.has_limit
    assert asked.settings.sampling.temperature == 0.5 and asked.settings.ending.stop_ids == (END,)
    assert (asked.n, asked.text, asked.speech, asked.stream, asked.tools) == (1, True, False, False, None)
    assert _asked().settings.seed != _asked().settings.seed


@pytest.mark.parametrize(
    "field, value, group, name, expected",
    [
        ("temperature", 1.5, "sampling", "temperature", 1.5),
        ("top_p", 0.5, "sampling", "top_p", 0.5),
        ("top_k", 7, "sampling", "top_k", 7),
        ("top_k", -1, "sampling", "top_k", 0),
        ("min_p", 0.25, "sampling", "min_p", 0.25),
        ("repetition_penalty", 1.2, "sampling", "repetition_penalty", 1.2),
        ("max_tokens", 5, "ending", "max_new_tokens", 5),
        ("max_completion_tokens", 6, "ending", "max_new_tokens", 6),
        ("stop", "end", "ending", "stop", ["end"]),
        ("stop", ["a", "b"], "ending", "stop", ["a", "b"]),
        ("stop_token_ids", [3, 4], "ending", "stop_ids", (END, 3, 4)),
        ("ignore_eos", True, "ending", "stop_ids", ()),
        ("chat_template_kwargs", {"enable_thinking": False}, "preparation", "thinking", False),
        ("mm_processor_kwargs", {"use_audio_in_video": True}, "preparation", "use_audio_in_video", True),
        ("mm_processor_kwargs", {"fps": 1.0}, "preparation", "fps", 1.0),
        ("mm_processor_kwargs", {"min_pixels": 1024}, "preparation", "media", {"min_pixels": 1024}),
    ],
)
def test_fields_become_settings(field, value, group, name, expected):
    assert getattr(getattr(_asked(**{field: value}).settings, group), name) == expected


def test_seed_and_limit_and_counts():
    asked = _asked(seed=5, n=3, temperature=1, max_tokens=9, max_completion_tokens=9)
    assert (asked.settings.seed, asked.n, asked.settings.ending.max_new_tokens, asked.has_limit) == (5, 3, 9, True)
    asked = _asked(logprobs=True, top_logprobs=4)
    assert asked.settings.sampling.logprobs == 4
    assert _asked(logprobs=True).settings.sampling.logprobs == 0
    assert _asked(logprobs=False).settings.sampling.logprobs is None


def test_streams_count_tokens_as_asked():
    asked = _asked(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert asked.stream and asked.include_usage and asked.continuous_usage
    assert not _asked(stream=True, stream_options={"include_obfuscation": False}).include_usage


@pytest.mark.parametrize(
    "fields",
    [
        {"audio": {"voice": "Chelsie", "format": "flac"}},
        {"audio": {"voice": {"id": "Chelsie"}, "format": "flac"}},
        {"voice": "Chelsie", "audio": {"format": "flac"}},
        {"speaker": "Chelsie", "audio": {"format": "flac"}},
    ],
)
def test_voices_by_all_their_names(fields):
    asked = _asked(modalities=["text", "audio"], talker_temperature=0, max_frames=8, **fields)
    assert asked.speech and asked.text and asked.sound == "flac"
    voice = asked.settings.voice
    assert (voice.speaker, voice.speech_temperature, voice.max_frames) == ("Chelsie", 0, 8)


@pytest.mark.parametrize(
    "voices, voice, speaker",
    [
        (("Ethan", "Chelsie"), "alloy", "chelsie"),
        (("Ethan", "Chelsie"), "Onyx", "ethan"),  # aiden, which this model lacks: as the server has it
        (("Ethan", "Chelsie"), "CHELSIE", "CHELSIE"),
        (("Alloy", "Chelsie"), "alloy", "alloy"),
        (None, "nobody", "nobody"),
    ],
)
def test_voices_of_openai_are_other_names(voices, voice, speaker):
    defaults = Defaults({"speaker": "ethan"}, END, voices)
    asked = read_chat({"messages": MESSAGES, "modalities": ["audio"], "audio": {"voice": voice}}, defaults)
    assert asked.settings.voice.speaker == speaker
    assert read_speech({"input": "Hi", "voice": voice}, defaults).settings.voice.speaker == speaker


@pytest.mark.parametrize("field", ["voice", "speaker"])
def test_voices_that_nobody_has(field):
    with pytest.raises(RequestError, match="ethan") as caught:
        read_speech({"input": "Hi", field: "nobody"}, Defaults({}, END, ("Ethan",)))
    assert caught.value.param == field


def test_speech_alone_and_its_default_format():
    asked = _asked(modalities=["audio"])
    assert asked.speech and not asked.text and asked.sound == "wav" and asked.settings.voice.speaker == "ethan"
    assert not _asked(audio={"voice": "chelsie", "format": "mp3"}).speech
    assert _asked(modalities=["audio"], audio={"format": "pcm"}).sound == "pcm16"


def test_tools_and_their_choice():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert _asked(tools=tools).tools == tools and _asked(tools=tools, tool_choice="auto").tools == tools
    assert _asked(tools=tools, tool_choice="none").tools is None and _asked(tools=[]).tools is None
    assert _refused(tools=tools, tool_choice="required").param == "tool_choice"
    assert _refused(tools=tools, tool_choice={"type": "function", "function": {"name": "f"}}).param == "tool_choice"


def test_messages_as_clients_send_them_back():
    reply = {"role": "assistant", "content": "Hi", "audio": {"id": "x"}, "refusal": None, "annotations": []}
    asked = read_chat({"messages": [{"role": "developer", "content": "Be short."}, reply]}, DEFAULTS)
    assert asked.messages[0]["role"] == "system" and "audio" not in asked.messages[1]
    with pytest.raises(RequestError, match="transcript"):
        read_chat({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, DEFAULTS)


def test_fields_that_change_nothing_are_ignored():
    ignored = {"user": "me", "store": True, "metadata": {"a": "b"}, "functions": None, "temperature": None}
    neutral = {
        "parallel_tool_calls": True,
        "include_reasoning": True,
        "return_token_ids": False,
        "detokenize": True,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "skip_special_tokens": True,
    }
    asked = _asked(**ignored, **neutral, response_format={"type": "text"})
    assert asked.settings.sampling.temperature == 0.5


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"echo": 0}, "echo"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop_token_ids": "7"}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"talker_temperature": 0.5, "speech_temperature": 0.6}, "speech_temperature"),
        ({"max_frames": 4, "talker_max_new_tokens": 5}, "talker_max_new_tokens"),
        ({"audios": ["x"]}, "audios"),
        ({"n": 1000}, "n"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["smell"]}, "modalities"),
        ({"modalities": []}, "modalities"),
        ({"modalities": "audio"}, "modalities"),
        ({"modalities": ["audio"], "audio": {"format": "aac"}}, "audio.format"),
        ({"modalities": ["audio"], "audio": 1}, "audio"),
        ({"modalities": ["audio"], "voice": "a", "speaker": "b"}, "audio.voice"),
        ({"modalities": ["audio"], "voice": 1}, "voice"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"mm_processor_kwargs": {"x": 1}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"min_pixels": -1}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": []}, "mm_processor_kwargs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"modalities": ["audio"], "audio": {"speed": 2}}, "audio.speed"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"include_reasoning": False}, "include_reasoning"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"detokenize": False}, "detokenize"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(fields, param):
    error = _refused(**fields)
    assert error.status == 400 and error.param == param
    assert error.body()["error"]["type"] == "invalid_request_error" and error.message


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "fields, param, limit",
    [
        ({"messages": MESSAGES * 1025}, "messages", "1,024"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1025}]}, "messages", "1,024"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": "a" * 1001}, "stop", "1,000"),
        ({"stop": ["b", "a" * 1001]}, "stop", "1,000"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids", "128"),
        ({"tools": [TOOL] * 129}, "tools", "128"),
    ],
)
def test_what_is_too_much_is_refused_with_its_limit(fields, param, limit):
    error = _refused(**fields)
    assert (error.status, error.param) == (400, param) and f"at most {limit}" in error.message


def test_as_much_as_is_allowed():
    asked = _asked(messages=MESSAGES * 1024, stop=["a" * 1000] * 16, stop_token_ids=[1] * 128, tools=[TOOL] * 128)
    assert len(asked.messages) == 1024 and len(asked.tools or ()) == 128


@pytest.mark.parametrize("fields", [{"temprature" * 400_000: 1}, {"temperature": [0.5] * 1_000_000},
                                    {"audio": {"x" * 400_000: 1}, "modalities": ["audio"]}])  # fmt: skip
def test_errors_about_large_values_are_short_and_quick(fields):
    start = time.process_time()
    error = _refused(**fields)
    assert time.process_time() - start < 0.1 and len(error.message) < 300 and len(error.param or "") < 100


def test_names_of_one_setting_may_agree():
    assert _asked(max_frames=4, talker_max_new_tokens=4).settings.voice.max_frames == 4
    assert "message's content" in _refused(images=["x"]).message


@pytest.mark.parametrize("body", [None, [], "text", 3])
def test_bodies_that_are_no_objects(body):
    with pytest.raises(RequestError, match="JSON object"):
        read_chat(body, DEFAULTS)


def test_models_by_name():
    check_model(None, "here")
    check_model("here", "here")
    with pytest.raises(RequestError) as caught:
        check_model("gpt", "here")
    assert caught.value.status == 404 and caught.value.code == "model_not_found"


def test_texts_to_say():
    asked = read_speech({"model": "m", "input": "Hello", "voice": "chelsie", "seed": 3, "speech_top_k": 5}, DEFAULTS)
    assert (asked.text, asked.sound, asked.events, asked.settings.seed) == ("Hello", "mp3", False, 3)
    assert asked.settings.voice.speaker == "chelsie" and asked.settings.voice.speech_top_k == 5
    asked = read_speech({"input": "Hi", "response_format": "pcm", "stream_format": "sse", "speed": 1.0}, DEFAULTS)
    assert asked.sound == "pcm16" and asked.events


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"input": " "}, "input"),
        ({"input": None}, "input"),
        ({"input": "x" * 100_001}, "input"),
        ({"input": "a", "speed": 2}, "speed"),
        ({"input": "a", "instructions": "loudly"}, "instructions"),
        ({"input": "a", "response_format": "aac"}, "response_format"),
        ({"input": "a", "stream_format": "x"}, "stream_format"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ],
)
def test_texts_that_cannot_be_said(fields, param):
    with pytest.raises(RequestError) as caught:
        read_speech(fields, DEFAULTS)
    assert caught.value.param == param


def test_sounds_to_write_down():
    form = {"model": "m", "language": "de", "prompt": "Names: Ada.", "temperature": "0", "response_format": "text"}
    asked = read_transcription(form, b"RIFF", "Transcribe the {language}audio.", DEFAULTS)
    sound, words = asked.chat.messages[0]["content"]
    assert sound == {"type": "audio", "audio": b"RIFF"} and words["text"] == "Transcribe the German audio.\nNames: Ada."
    assert asked.form == "text" and asked.chat.model == "m" and asked.chat.settings.sampling.temperature == 0
    plain = read_transcription({"stream": "true"}, b"", "Transcribe the {language}audio.", DEFAULTS)
    assert plain.chat.messages[0]["content"][1]["text"] == "Transcribe the audio." and plain.chat.stream


@pytest.mark.parametrize(
    "form",
    [{"language": "xx"}, {"temperature": "hot"}, {"response_format": "srt"}, {"stream": "no way"}, {"x": "y"},
     {"timestamp_granularities[]": "word"}],
)  # fmt: skip
def test_sounds_that_cannot_be_written_down(form):
    with pytest.raises(RequestError) as caught:
        read_transcription(form, b"", "", DEFAULTS)
    assert caught.value.param == next(iter(form))
