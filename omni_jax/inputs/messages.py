"""Messages as users write them: checked, freed of their media, and brought to the one form that chat templates read.

First station of a prompt. Accepted is the form of Hugging Face, {"type": "image", "image": path}, and OpenAI's parts
`image_url`, `audio_url`, `video_url` (data: URLs and local paths) and `input_audio`; the media go on to `image`,
`audio` and `video`, the rest to `prompt`. Nothing is fetched.

Source: HF `ProcessorMixin.apply_chat_template` and its normalisation of messages. Deliberate difference: what a
template would drop without a word (an unknown role or part, a misspelt key) or render as nonsense is an error that
names the message and part.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from omni_jax.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
KINDS = ("image", "audio", "video")
# The setting of an array that a file states itself, by kind.
RATES = {"audio": "sampling_rate", "video": "fps"}
MAX_PARTS = 1024  # media and texts of one conversation
MAX_CHARACTERS = 8_000_000  # of all texts of one conversation; far beyond any context
REASONING = ("reasoning_content", "thinking", "reasoning")  # the name that templates read, then its aliases
HEADERLESS = ("pcm16", "pcm", "raw")  # formats of input_audio that state no rate
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C:\clip.mp4 is a path


@dataclass(frozen=True, eq=False)
class Media:
    """One picture, sound or video: where it comes from, the rate stated beside it, and where it stands, for errors."""

    kind: str
    source: Any
    rate: float | None
    where: str


@dataclass(frozen=True, eq=False)
class Conversation:
    """Checked messages of plain JSON values, in which a medium is {"type": kind, kind: ""}, and the media in order."""

    messages: list[dict[str, Any]]
    media: list[Media]
    tools: list[dict[str, Any]] | None


def read_conversation(messages: Any, tools: Any = None) -> Conversation:
    """Check one conversation and its tools; raises InputError naming the message and part that cannot be used."""
    if not isinstance(messages, (list, tuple)):
        raise InputError(f"messages of type {type(messages).__name__}; pass a list of {{'role': ..., 'content': ...}}")
    if not messages:
        raise InputError("messages is empty; give at least one")
    media: list[Media] = []
    plain = [_read_message(message, f"message {i}", media) for i, message in enumerate(messages)]
    parts = sum(len(m["content"]) if isinstance(m["content"], list) else 1 for m in plain)
    if parts > MAX_PARTS:
        raise InputError(f"the conversation has {parts} parts; at most {MAX_PARTS} are accepted")
    tools = None if tools is None else _read_tools(tools)
    characters = len(json.dumps([plain, tools], ensure_ascii=False))
    if characters > MAX_CHARACTERS:
        raise InputError(f"the conversation has {characters} characters; at most {MAX_CHARACTERS} are accepted")
    return Conversation(plain, media, tools)


def is_conversation(messages: Any) -> bool:
    """Whether `messages` is one conversation, rather than a list of them."""
    return not (isinstance(messages, (list, tuple)) and len(messages) and isinstance(messages[0], (list, tuple)))


def _read_message(message: Any, where: str, media: list[Media]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{where} is of type {type(message).__name__}; pass {{'role': ..., 'content': ...}}")
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{where} has the role {role!r}; roles are {', '.join(ROLES)}")
    plain = {"role": role, "content": _read_content(message, where, media)}
    for key in (*REASONING, "name", "tool_call_id"):
        if message.get(key) is not None:
            name = REASONING[0] if key in REASONING else key
            plain.setdefault(name, _string(message[key], f"{where}: {key!r}"))
    if message.get("tool_calls") is not None:
        plain["tool_calls"] = _read_calls(message["tool_calls"], where)
    return plain


def _read_content(message: dict, where: str, media: list[Media]) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant" and message.get("tool_calls"):
            return ""
        raise InputError(f"{where} has no 'content'; give a string or a list of parts")
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{where}: 'content' is of type {type(content).__name__}; give a string or a list of parts")
    return [_read_part(part, f"{where}, part {i}", media) for i, part in enumerate(content)]


def _read_part(part: Any, where: str, media: list[Media]) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise InputError(f"{where} is of type {type(part).__name__}; pass {{'type': 'text', 'text': ...}} or media")
    form = part.get("type")
    if form == "text":
        _only(part, ("type", "text"), where)
        return {"type": "text", "text": _string(_need(part, "text", where), f"{where}: 'text'")}
    if form in KINDS:
        keys = (form, "url", "path", "base64")
        _only(part, ("type", *keys, *([RATES[form]] if form in RATES else ())), where)
        given = [key for key in keys if part.get(key) is not None]
        if len(given) != 1:
            raise InputError(f"{where} of type {form!r} has the keys {list(part)}; give exactly one of {list(keys)}")
        kind, source = form, part[given[0]]
        source = _from_base64(source, where) if given[0] == "base64" else source
    elif form in ("image_url", "audio_url", "video_url"):
        kind, source = form.removesuffix("_url"), _need(part, form, where)
        source = _need(source, "url", f"{where}: {form!r}") if isinstance(source, dict) else source
        source = _string(source, f"{where}: the URL")
    elif form == "input_audio":
        kind, source = "audio", _read_input_audio(_need(part, form, where), where)
    else:
        raise InputError(f"{where} has the type {form!r}; types are text, image, audio, video and OpenAI's image_url, "
                         "audio_url, video_url, input_audio")  # fmt: skip
    media.append(Media(kind, _resolve(source, kind, where), _read_rate(part, kind, where), where))
    return {"type": kind, kind: ""}


def _read_input_audio(sound: Any, where: str) -> Any:
    """OpenAI's {"data": base64, "format": "wav"}; what the format is, the data say themselves."""
    if not isinstance(sound, dict):
        raise InputError(f"{where}: 'input_audio' is of type {type(sound).__name__}; pass data and format")
    if sound.get("format") in HEADERLESS:
        raise InputError(f"{where}: format {sound['format']!r} states no sampling rate; send wav, or an 'audio' array")
    data = _string(_need(sound, "data", where), f"{where}: 'data'")
    return data if _SCHEME.match(data) else _from_base64(data, where)


def _read_rate(part: dict, kind: str, where: str) -> float | None:
    rate = part.get(RATES.get(kind, ""))
    if rate is None:
        return None
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise InputError(f"{where}: {RATES[kind]!r} is {rate!r}; give a positive number")
    return rate


def _resolve(source: Any, kind: str, where: str) -> Any:
    """A source with data: and file: URLs made bytes and paths; other URLs are refused."""
    if not isinstance(source, str):
        return source
    if not source:
        raise InputError(f"{where}: the {kind} is an empty string; pass a path")
    scheme = found[1].lower() if (found := _SCHEME.match(source)) else ""
    if scheme == "data":
        header, comma, data = source.partition(",")
        if not comma:
            raise InputError(f"{where}: the data: URL has no comma; write data:{kind}/...;base64,...")
        return _from_base64(unquote(data), where) if header.endswith(";base64") else unquote_to_bytes(data)
    if scheme == "file":
        return unquote(re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", source))
    if scheme:
        raise InputError(f"{where}: {source[:80]!r} is a remote URL; nothing is fetched: download the {kind} first")
    return source


def _from_base64(data: Any, where: str) -> bytes:
    try:
        return base64.b64decode("".join(_string(data, f"{where}: the base64 data").split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: the base64 data cannot be decoded ({error})") from None


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls, nested as OpenAI's {"function": {"name", "arguments"}} or flat; arguments are a dict or its JSON."""
    if not isinstance(calls, (list, tuple)):
        raise InputError(f"{where}: 'tool_calls' is of type {type(calls).__name__}; pass a list")
    plain = []
    for i, call in enumerate(calls):
        inner = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise InputError(f"{where}: tool call {i} has no function name; pass {{'function': {{'name': ...}}}}")
        if not isinstance(inner.get("arguments"), (dict, str)):
            raise InputError(f"{where}: tool call {i} has no 'arguments'; pass a dict or its JSON")
        plain.append(_json(call, f"{where}: tool call {i}"))
    return plain


def _read_tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, (list, tuple)):
        raise InputError(f"tools of type {type(tools).__name__}; pass a list of JSON schemas")
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise InputError(f"tool {i} is of type {type(tool).__name__}; pass its JSON schema as a dict")
    return [_json(tool, f"tool {i}") for i, tool in enumerate(tools)]


def _json(value: Any, where: str) -> Any:
    """A copy of plain JSON values."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be written as JSON ({error})") from None


def _need(values: Any, key: str, where: str) -> Any:
    if not isinstance(values, dict) or values.get(key) is None:
        raise InputError(f"{where} has no {key!r}")
    return values[key]


def _only(part: dict, keys: tuple[str, ...], where: str) -> None:
    unknown = [key for key in part if key not in keys]
    if unknown:
        raise InputError(f"{where} of type {part['type']!r} has the unknown key {unknown[0]!r}; keys are {list(keys)}")


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is of type {type(value).__name__}; give a string")
    return value
