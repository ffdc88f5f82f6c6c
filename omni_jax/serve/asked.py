"""The JSON body of a request as a checked `Asked`: the conversation, and the settings of its reply.

Accepted are the fields of OpenAI's chat API and those that clients of vLLM and SGLang add. What is stated nowhere is as
in the server's flags. Fields that change no reply (`user`, `metadata`) are ignored, others are accepted with the value
that changes nothing, and anything else is an error that names the field and the remedy, because a reply that ignores
what it was asked for is worse than none. A field whose value is null is absent.

    body -> read_chat -> Asked -> media.resolve, Omni.prepare -> engine -> answered
"""

import difflib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omni_jax.errors import InputError
from omni_jax.inputs.messages import MAX_PARTS
from omni_jax.inputs.options import Options
from omni_jax.inputs.values import SHOWN, shown, whole
from omni_jax.serve.errors import RequestError, invalid
from omni_jax.serve.sounds import FORMATS
from omni_jax.serve.voices import speaker_of
from omni_jax.settings import MAX_LOGPROBS, Settings

MOST_REPLIES = 128  # of one request, as OpenAI has it
# The most values that a field may list, and the characters of one text in `stop`.
MOST = {"messages": MAX_PARTS, "stop": 16, "stop_token_ids": 128, "tools": 128}
MOST_STOP_CHARACTERS = 1_000
MODALITIES = ("text", "audio")

# Fields whose values are settings: the name of each setting.
SETTINGS = {
    **{name: name for name in ("temperature", "top_p", "min_p", "repetition_penalty", "max_frames")},
    **{f"speech_{name}": f"speech_{name}" for name in ("temperature", "top_k", "top_p", "repetition_penalty")},
    **{f"talker_{name}": f"speech_{name}" for name in ("temperature", "top_k", "top_p", "repetition_penalty")},
    "talker_max_new_tokens": "max_frames",
}  # fmt: skip
LIMITS = ("max_completion_tokens", "max_tokens")
# Fields that are read one by one below.
READ = (
    "model", "messages", "max_tokens", "max_completion_tokens", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos",
    "n", "logprobs", "top_logprobs", "tools", "tool_choice", "modalities", "audio", "voice", "speaker",
    "chat_template_kwargs", "mm_processor_kwargs", "stream", "stream_options",
)  # fmt: skip
# Fields that change no reply of this model.
IGNORED = frozenset(
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "reasoning_effort verbosity request_id priority spaces_between_special_tokens".split()
)
# Fields that would change a reply, with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "min_tokens": (0,),
    "length_penalty": (1,), "use_beam_search": (False,), "skip_special_tokens": (True,), "echo": (False,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "include_stop_str_in_output": (False,),
    "response_format": ({"type": "text"},), "functions": ([],), "function_call": ("none",), "documents": ([],),
    "cache_salt": (), "parallel_tool_calls": (True,), "include_reasoning": (True,), "return_token_ids": (False,),
    "detokenize": (True,),
}  # fmt: skip
INSTEAD = {
    "cache_salt": "clients share what is kept, unless the server has --keep-mib 0",
    "presence_penalty": "there is repetition_penalty", "frequency_penalty": "there is repetition_penalty",
    "functions": "write them as tools", "function_call": "write it as tool_choice",
    "response_format": "replies are text; ask for JSON in the prompt",
    "use_audio_in_video": "write it into mm_processor_kwargs", "fps": "write it into mm_processor_kwargs",
    "enable_thinking": "write it into chat_template_kwargs", "prompt": "write messages",
    "parallel_tool_calls": "the model calls as often as it likes; use the first call",
    "include_reasoning": "reasoning is always sent; leave out what is not wanted",
    "return_token_ids": "tokens are sent as text; logprobs has the bytes of each",
    "detokenize": "replies are always text",
    **dict.fromkeys(("images", "audios", "videos"), "write each as a part of a message's content"),
}  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """What a body may leave open: settings by name, as `Settings.read` takes them, and the id that ends a turn.

    voices: names of the model's speakers, none if it does not speak, None where they are not known.
    """

    settings: Mapping[str, Any]
    end_id: int
    voices: Sequence[str] | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """A chat request.

    messages, tools: as the client wrote them; media are not looked at yet. settings: of the reply. has_limit: whether
    the most tokens are stated, and not only the server's own limit. n: replies. text, speech: which of the two are
    wanted. sound: the format of speech, one of `sounds.FORMATS`. stream: whether pieces are sent as they come.
    include_usage: whether a last chunk of a stream counts tokens; continuous_usage: whether each does. model: the name
    that was asked for. names: of the fields that settings were read from, by setting.
    """

    messages: list[Any]
    tools: list[Any] | None
    settings: Settings
    has_limit: bool
    n: int = 1
    text: bool = True
    speech: bool = False
    sound: str = "wav"
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    model: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def read_chat(body: Any, defaults: Defaults) -> Asked:
    """The request that a chat body states; RequestError for one that cannot be."""
    given = known_fields(body, (*READ, *SETTINGS), IGNORED, NEUTRAL)
    _check_lengths(given)
    stream, modalities = flag_of(given, "stream"), _modalities(given)
    options = _object(given, "stream_options") if stream else {}
    speech = "audio" in modalities
    voice, sound = _voice(given, defaults.voices) if speech else ({}, "wav")
    limit = _limit(given)
    stated = _passed(given) | _drawing(given) | _ending(given, defaults.end_id) | _preparation(given) | voice
    stated |= {} if limit is None else {"max_new_tokens": limit}
    settings = _settings({**defaults.settings, **stated, "seed": seed_of(given)})
    return Asked(
        messages=_messages(given),
        tools=_tools(given),
        settings=settings,
        has_limit=limit is not None,
        n=_replies(given, settings.sampling.temperature),
        text="text" in modalities,
        speech=speech,
        sound=sound,
        stream=stream,
        include_usage=flag_of(options, "include_usage", "stream_options."),
        continuous_usage=flag_of(options, "continuous_usage_stats", "stream_options."),
        model=text_of(given, "model"),
        names=_names(given),
    )


def known_fields(
    body: Any, known: tuple[str, ...], ignored: frozenset[str], neutral: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The fields of a body that are known and not null; RequestError for others that cannot be ignored."""
    if not isinstance(body, dict):
        raise invalid(f"the body is of type {type(body).__name__}; send a JSON object")
    given = {}
    for name, value in body.items():
        if value is None or name in ignored:
            continue
        if name in known:
            given[name] = value
        elif name not in neutral:
            short = name[:SHOWN]
            raise invalid(f"{short!r} is no field of this request; {_meant(short, known)}", short)
        elif not any(value == free and isinstance(value, bool) == isinstance(free, bool) for free in neutral[name]):
            accepted = "".join(f", or send {shown(free)}" for free in neutral[name][:1])
            remedy = INSTEAD.get(name, f"leave it out{accepted}")
            raise invalid(f"{name} is {shown(value)}, which this server cannot do; {remedy}", name)
    return given


def _meant(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return INSTEAD.get(name) or (f"did you mean {near[0]!r}?" if near else "leave it out")


def _check_lengths(given: Mapping[str, Any]) -> None:
    """RequestError for a list with more values than the server looks at."""
    for name, most in MOST.items():
        value = given.get(name)
        if isinstance(value, list) and len(value) > most:
            raise invalid(f"{name} has {len(value):,} values; at most {most:,} are read", name)


def flag_of(given: Mapping[str, Any], name: str, where: str = "") -> bool:
    """A field that is true or false, by default false."""
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{where}{name} is {shown(value)}; it is true or false", where + name)
    return bool(value)


def text_of(given: Mapping[str, Any], name: str) -> str | None:
    """A field that is a text, None if it is absent."""
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(f"{name} is {shown(value)}; it is a text", name)
    return value


def seed_of(given: Mapping[str, Any]) -> int:
    """The seed that is stated, else one that nobody can foresee."""
    if "seed" not in given:
        return secrets.randbits(62)
    return _whole(given, "seed", 0, 2**63 - MOST_REPLIES, 0)


def _whole(given: Mapping[str, Any], name: str, least: int, most: int, otherwise: int) -> int:
    """A field that is a whole number from `least` to `most`."""
    try:
        return whole(name, given.get(name, otherwise), f"it is a whole number from {least} to {most}", least, most)
    except InputError as error:
        raise invalid(str(error), name) from error


def _object(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that is an object, without its nulls; empty if it is absent."""
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise invalid(f"{name} is {shown(value)}; it is an object", name)
    return {key: one for key, one in value.items() if one is not None}


def _checked(field: str, setting: str, value: Any) -> Any:
    """The value of a setting after its check, whose error names the field."""
    try:
        Settings.read({setting: value})
    except InputError as error:
        raise invalid(str(error).replace(setting, field, 1), field) from error
    return value


def _settings(stated: Mapping[str, Any]) -> Settings:
    try:
        return Settings.read(stated)
    except InputError as error:
        raise invalid(str(error)) from error


def _passed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings whose fields have their values; a setting may be stated by several names if they agree."""
    stated: dict[str, Any] = {}
    for name, value in given.items():
        if name in SETTINGS:
            setting = SETTINGS[name]
            if stated.setdefault(setting, _checked(name, setting, value)) != value:
                other = next(one for one in given if SETTINGS.get(one) == setting)
                raise invalid(f"{other} is {shown(stated[setting])} and {name} is {shown(value)}; send one", name)
    return stated


def _names(given: Mapping[str, Any]) -> dict[str, str]:
    """The name by which the client knows each setting that a model may still find fault with."""
    limit = next((name for name in LIMITS if name in given), "max_tokens")
    voice = next((name for name in ("voice", "speaker") if name in given), "audio.voice")
    named = {"max_new_tokens": limit, "speaker": voice, "stop": "stop", "stop_ids": "stop_token_ids"}
    return named | {SETTINGS[name]: name for name in given if name in SETTINGS}


def _replies(given: Mapping[str, Any], temperature: float) -> int:
    """How many replies are wanted; greedy ones would all be the same."""
    n = _whole(given, "n", 1, MOST_REPLIES, 1)
    if n > 1 and temperature == 0:
        raise invalid(f"n is {n}, but greedy replies are all the same; set a temperature, or leave out n", "n")
    return n


def _drawing(given: Mapping[str, Any]) -> dict[str, Any]:
    """top_k, for which -1 is off too, and how many alternatives to each token are reported."""
    stated: dict[str, Any] = {}
    if "top_k" in given:
        stated["top_k"] = 0 if given["top_k"] == -1 else _checked("top_k", "top_k", given["top_k"])
    wanted = flag_of(given, "logprobs")
    if "top_logprobs" in given and not wanted:
        raise invalid("top_logprobs goes with logprobs: true; send both", "top_logprobs")
    if wanted:
        stated["logprobs"] = _whole(given, "top_logprobs", 0, MAX_LOGPROBS, 0)
    return stated


def _limit(given: Mapping[str, Any]) -> int | None:
    """The most tokens of the reply, by either name; None if it is not stated."""
    names = [name for name in LIMITS if name in given]
    limits = [_checked(name, "max_new_tokens", given[name]) for name in names]
    if len({*limits}) > 1:
        raise invalid(f"max_completion_tokens is {limits[0]} and max_tokens is {limits[1]}; send one", names[1])
    return limits[0] if limits else None


def _ending(given: Mapping[str, Any], end_id: int) -> dict[str, Any]:
    """Where the reply ends: stop strings, and stop ids beside the end of the turn unless that is ignored."""
    stop, ids = given.get("stop"), given.get("stop_token_ids", [])
    texts = [stop] if isinstance(stop, str) else stop
    if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise invalid(f"stop is {shown(stop)}; it is a text or a list of texts", "stop")
    if (longest := max(map(len, texts or ()), default=0)) > MOST_STOP_CHARACTERS:
        raise invalid(f"stop has a text of {longest:,} characters; give at most {MOST_STOP_CHARACTERS:,}", "stop")
    if not isinstance(ids, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise invalid(f"stop_token_ids is {shown(ids)}; it is a list of token ids", "stop_token_ids")
    ending = [] if flag_of(given, "ignore_eos") else [end_id]
    return {"stop_ids": (*ending, *ids)} | ({} if texts is None else {"stop": texts})


def _preparation(given: Mapping[str, Any]) -> dict[str, Any]:
    """How the conversation becomes a prompt: options of the template and of media."""
    template, media = _object(given, "chat_template_kwargs"), _object(given, "mm_processor_kwargs")
    stated: dict[str, Any] = {}
    for name, value in template.items():
        if name != "enable_thinking":
            raise invalid(f"the chat template takes no {shown(name)}; there is enable_thinking", "chat_template_kwargs")
        stated["thinking"] = _checked("chat_template_kwargs.enable_thinking", "thinking", value)
    known = [one.name for one in fields(Options)]
    for name in media:
        if name not in known:
            raise invalid(f"{shown(name)} is no option of media; there are {', '.join(known)}", "mm_processor_kwargs")
    own = {name: media.pop(name) for name in ("fps", "use_audio_in_video") if name in media}
    try:
        Settings.read({**own, "media": media})
    except InputError as error:
        raise invalid(f"mm_processor_kwargs: {error}", "mm_processor_kwargs") from error
    return stated | own | ({"media": media} if media else {})


def _modalities(given: Mapping[str, Any]) -> list[str]:
    """What the reply is made of, by default text alone."""
    wanted = given.get("modalities", ["text"])
    if not isinstance(wanted, list) or not wanted or any(one not in MODALITIES for one in wanted):
        raise invalid(f"modalities is {shown(wanted)}; it is a list of 'text', 'audio' or both", "modalities")
    return wanted


def _voice(given: Mapping[str, Any], voices: Sequence[str] | None) -> tuple[dict[str, str], str]:
    """Who speaks, and the format of the sound."""
    audio = _object(given, "audio")
    if unknown := [name for name in audio if name not in ("voice", "format")]:
        name = f"audio.{unknown[0][:SHOWN]}"
        raise invalid(f"{name} is not known here; audio holds voice and format", name)
    return speaker_of(given, audio, voices), format_of(audio.get("format", "wav"), "audio.format")


def format_of(value: Any, param: str) -> str:
    """A format of sound as `sounds.FORMATS` has it."""
    name = "pcm16" if value == "pcm" else value
    if not isinstance(name, str) or name not in FORMATS:
        raise invalid(f"{param} is {shown(value)}; sound is sent as {', '.join(FORMATS)}", param)
    return name


def _messages(given: Mapping[str, Any]) -> list[Any]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages is no list, or empty; send [{'role': 'user', 'content': ...}]", "messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    if (parts := sum(len(content) for content in contents if isinstance(content, list))) > MAX_PARTS:
        raise invalid(f"messages have {parts:,} parts; at most {MAX_PARTS:,} are read", "messages")
    return [_message(message, i) if isinstance(message, dict) else message for i, message in enumerate(messages)]


def _message(message: dict[str, Any], i: int) -> dict[str, Any]:
    """A message without what OpenAI's replies add to it, so that clients can send replies back."""
    if message.get("role") == "developer":
        message = message | {"role": "system"}
    if message.get("role") != "assistant" or "audio" not in message:
        return message
    if not message.get("content") and not message.get("tool_calls"):
        raise invalid(
            f"message {i} refers to speech by its id, and no speech is kept; send its transcript as 'content'",
            f"messages[{i}].audio",
        )
    return {key: value for key, value in message.items() if key != "audio"}


def _tools(given: Mapping[str, Any]) -> list[Any] | None:
    """The functions that the model may call, None for none."""
    tools, choice = given.get("tools"), given.get("tool_choice", "auto")
    if tools is not None and not isinstance(tools, list):
        raise invalid(f"tools is {shown(tools)}; it is a list of functions", "tools")
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            remedy = "a tool has the type 'function' and a function with a name"
            raise invalid(f"tools holds {shown(tool)}; {remedy}", "tools")
    if choice not in ("auto", "none"):
        raise invalid(f"tool_choice is {shown(choice)}, and no call can be promised; send 'auto' or 'none'",
                      "tool_choice")  # fmt: skip
    return None if choice == "none" or not tools else tools


def check_model(asked: str | None, served: str) -> None:
    """RequestError, as OpenAI has it, for a model that is not the one here; None is any."""
    if asked is not None and asked != served:
        message = f"there is no model {asked[:200]!r} here; this server has {served!r}"
        raise RequestError(404, message, param="model", code="model_not_found")
