"""Messages as users write them: checked, separated from their media, and converted to the form that templates read.

The first step of every prompt, whether from Python, the command line or a dataset. Accepted are the form of Hugging
Face, {"type": "image", "image": path}, with the options of the model's official utilities beside it (`options`), and
OpenAI's parts `image_url`, `audio_url`, `video_url` (data: URLs and local paths) and `input_audio`. Media are passed to
`image`, `audio` and `video`, the rest to `prompt`. A key whose value is null is absent. Nothing is downloaded.

Source: HF `ProcessorMixin.apply_chat_template` and its normalisation of messages. Deliberate difference: what a
template would drop silently (an unknown role, part or key) or render as nonsense is an error that names the message and
part.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from omni_jax.errors import InputError
from omni_jax.files import MAX_DEPTH, depth_of, user_path
from omni_jax.inputs.options import OPTIONS, RATES, UNSTATED, Options, did_you_mean, number, read_options
from omni_jax.inputs.source import is_source, scheme_of
from omni_jax.inputs.values import shown

ROLES = ("system", "user", "assistant", "tool")
KINDS = ("image", "audio", "video")
URLS = ("image_url", "audio_url", "video_url")
MAX_PARTS = 1024  # media and texts of one conversation
MAX_CHARACTERS = 8_000_000  # of all texts of one conversation; far beyond any context
REASONING = ("reasoning_content", "thinking", "reasoning")  # the name that templates read, and its aliases
HEADERLESS = ("pcm16", "pcm", "raw")  # formats of input_audio that state no sampling rate
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)
_PLACES = ("url", "path", "base64")  # keys of a medium, besides the name of its kind


@dataclass(frozen=True, eq=False)
class Media:
    """One picture, sound or video.

    source: a path, bytes, an array or a PIL image; for a video also a list of these, its frames. rate: samples or
    frames per second of an array. where: its message and part, for errors. options: those stated beside it.
    """

    kind: str
    source: Any
    rate: float | None
    where: str
    options: Options = UNSTATED


@dataclass(frozen=True, eq=False)
class Conversation:
    """Checked messages of plain JSON values, and their media in order, each a part {"type": kind, kind: ""} there."""

    messages: list[dict[str, Any]]
    media: list[Media]
    tools: list[dict[str, Any]] | None


def read_conversation(messages: Any, tools: Any = None) -> Conversation:
    """Check one conversation and its tools.

    messages: a list of messages, or {"messages": a list, "tools": ...}. tools: JSON schemas of functions.
    Raises InputError naming the message and part that cannot be used.
    """
    given, tools = _unwrapped(messages, tools)
    media: list[Media] = []
    plain = [_read_message(message, f"message {i}", media) for i, message in enumerate(given)]
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
    if not isinstance(messages, (list, tuple)) or not messages:
        return True
    first = messages[0]
    return not (isinstance(first, (list, tuple)) or isinstance(first, dict) and "messages" in first)


def with_base(messages: Any, base: Path | None) -> Any:
    """The same messages with relative paths of media prefixed by `base`, so that they are found from any folder.

    base: the folder of the file that holds the messages. Invalid messages and parts are not changed;
    `read_conversation` reports them.
    """
    if base is None:
        return messages
    if isinstance(messages, dict) and "messages" in messages:
        return messages | {"messages": with_base(messages["messages"], base)}
    return [_based_message(message, base) for message in messages] if isinstance(messages, list) else messages


def _based_message(message: Any, base: Path) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = [_based_part(part, base) if isinstance(part, dict) else part for part in message["content"]]
    return message | {"content": content}


def _based_part(part: dict, base: Path) -> dict:
    form = part.get("type")
    keys = (form, "url", "path") if form in KINDS else (form,) if form in URLS else ()
    return part | {key: _based(part[key], base) for key in keys if part.get(key) is not None}


def _based(source: Any, base: Path) -> Any:
    """A source of any form, its relative path prefixed by `base`."""
    if isinstance(source, dict):
        return source | {key: _based(source[key], base) for key in ("url", "path") if isinstance(source.get(key), str)}
    if isinstance(source, list):
        return [_based(frame, base) for frame in source]
    if isinstance(source, str) and source and scheme_of(source) in ("", "file"):
        return str(base / user_path(_local(source), "a medium"))
    return source


def _unwrapped(messages: Any, tools: Any) -> tuple[Any, Any]:
    """The list of messages and the tools; a request to a server holds both in one object."""
    if isinstance(messages, dict) and "messages" in messages:
        extra = [key for key, value in messages.items() if key not in ("messages", "tools") and value is not None]
        if extra:
            name = shown(extra[0])
            raise InputError(f"beside 'messages' is the unknown key {name}; settings are arguments of the call")
        if tools is not None and messages.get("tools") is not None:
            raise InputError("tools are stated twice, beside 'messages' and in the call; leave one out")
        messages, tools = messages["messages"], messages.get("tools") if tools is None else tools
    if not isinstance(messages, (list, tuple)):
        raise InputError(f"messages of type {type(messages).__name__}; pass a list of {{'role': ..., 'content': ...}}")
    if not messages:
        raise InputError("messages is empty; give at least one")
    return messages, tools


def _read_message(message: Any, where: str, media: list[Media]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{where} is of type {type(message).__name__}; pass {{'role': ..., 'content': ...}}")
    role = message.get("role")
    if role not in ROLES:
        raise InputError(f"{where} has the role {shown(role)}; roles are {', '.join(ROLES)}")
    plain = {"role": role, "content": _read_content(message, where, media)}
    # Replies that clients have stored contain empty lists, such as `annotations`.
    unknown = [key for key, value in message.items() if key not in _KEYS and not _empty(value)]
    if unknown:
        raise InputError(f"{where} has the unknown key {shown(unknown[0])}{_belongs(unknown[0])}")
    for key in (*REASONING, "name", "tool_call_id"):
        if message.get(key) is not None:
            name = REASONING[0] if key in REASONING else key
            plain.setdefault(name, _text(message[key], f"{where}: {key!r}"))
    if message.get("tool_calls") is not None:
        plain["tool_calls"] = _read_calls(message["tool_calls"], where)
    return plain


def _empty(value: Any) -> bool:
    return value is None or isinstance(value, (str, list, tuple, dict)) and not value


def _belongs(key: Any) -> str:
    """The remedy for an unknown key of a message: where it belongs, or what was probably meant."""
    kind = str(key).removesuffix("s").removesuffix("_url")
    if kind in KINDS or key in OPTIONS["video"] or key in OPTIONS["audio"]:
        return "; media and their options belong in 'content', as a part {'type': 'image', 'image': ...}"
    if key == "function_call":
        return "; write it as 'tool_calls'"
    return "; write it as 'content'" if key in ("text", "value") else did_you_mean(key, _KEYS)


def _read_content(message: dict, where: str, media: list[Media]) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant" and message.get("tool_calls"):
            return ""
        raise InputError(f"{where} has no 'content'; give a string or a list of parts")
    if isinstance(content, str):
        return _text(content, f"{where}: 'content'")
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{where}: 'content' is of type {type(content).__name__}; give a string or a list of parts")
    return [_read_part(part, f"{where}, part {i}", media) for i, part in enumerate(content)]


def _read_part(given: Any, where: str, media: list[Media]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InputError(f"{where} is of type {type(given).__name__}; pass {{'type': 'text', 'text': ...}} or media")
    part = {key: value for key, value in given.items() if value is not None}
    form = part.get("type")
    if form == "text":
        part = {key: value for key, value in part.items() if key == "text" or not _empty(value)}
        _only(part, ("type", "text"), where)
        return {"type": "text", "text": _text(_need(part, "text", where), f"{where}: 'text'")}
    if form in KINDS:
        kind, source = form, _read_source(part, where)
        part = _with_rate(part, source, where)
    elif form in URLS:
        kind, source = form.removesuffix("_url"), _need(part, form, where)
        _only(part, ("type", form, *_beside(kind)), where)
        source = _need(source, "url", f"{where}: {form!r}") if isinstance(source, dict) else source
        source = _string(source, f"{where}: the URL")
    elif form == "input_audio":
        _only(part, ("type", form, *OPTIONS["audio"]), where)
        kind, source = "audio", _read_input_audio(_need(part, form, where), where)
    else:
        raise InputError(f"{where} has the type {shown(form)}; types are text, image, audio, video and OpenAI's "
                         "image_url, audio_url, video_url, input_audio")  # fmt: skip
    media.append(_medium(kind, _resolve(source, kind, where), part, where))
    return {"type": kind, kind: ""}


def _read_source(part: dict, where: str) -> Any:
    """The one source of a part in Hugging Face's form; `datasets` writes it as {"bytes": ..., "path": ...}."""
    kind = part["type"]
    keys = (kind, *_PLACES)
    _only(part, ("type", *keys, *_beside(kind)), where)
    given = [key for key in keys if key in part]
    if len(given) != 1:
        raise InputError(f"{where} of type {kind!r} has the keys {list(part)}; give exactly one of {list(keys)}")
    source = part[given[0]]
    return _from_base64(source, where) if given[0] == "base64" else source


def _with_rate(part: dict, source: Any, where: str) -> dict:
    """The part, with the rate of a sound decoded by `datasets`: {"array": ..., "sampling_rate": ...}."""
    rate = source.get("sampling_rate") if part["type"] == "audio" and isinstance(source, dict) else None
    if rate is not None and "sampling_rate" in part:
        raise InputError(f"{where}: 'sampling_rate' is stated twice, in the sound and beside it; leave one out")
    return part if rate is None else part | {"sampling_rate": rate}


def _beside(kind: str) -> tuple[str, ...]:
    """The keys that a part of a kind may have besides its medium."""
    return (*([RATES[kind]] if kind in RATES else ()), *OPTIONS[kind])


def _medium(kind: str, source: Any, part: dict, where: str) -> Media:
    options = read_options({name: part[name] for name in OPTIONS[kind] if name in part}, where)
    name = RATES.get(kind)
    rate = number(part[name], f"{where}: {name!r}") if name in part else options.fps
    if kind == "video" and name in part and (options.fps is not None or is_source(source)):
        raise InputError(f"{where}: 'sample_fps' is of frames that are sampled already; a file is sampled at 'fps'")
    return Media(kind, source, rate, where, options)


def _read_input_audio(sound: Any, where: str) -> Any:
    """OpenAI's {"data": base64, "format": "wav"}; the format is recognised from the data."""
    if not isinstance(sound, dict):
        raise InputError(f"{where}: 'input_audio' is of type {type(sound).__name__}; pass data and format")
    if sound.get("format") in HEADERLESS:
        raise InputError(f"{where}: format {sound['format']!r} states no sampling rate; send wav, or an 'audio' array")
    data = _string(_need(sound, "data", where), f"{where}: 'data'")
    return data if scheme_of(data) else _from_base64(data, where)


def _resolve(source: Any, kind: str, where: str) -> Any:
    """A source with data: and file: URLs replaced by bytes and paths, in a list of frames too; others are refused."""
    if isinstance(source, dict):
        keys = ("array", "bytes", "path", "sampling_rate") if kind == "audio" else ("bytes", "path")
        found = [source[key] for key in keys[:3] if source.get(key) is not None]
        if not found:
            raise InputError(f"{where}: the {kind} is a dict without 'bytes' and 'path'; pass a path or bytes")
        if unknown := [key for key, value in source.items() if key not in keys and not _empty(value)]:
            raise InputError(f"{where}: the {kind} is a dict with the unknown key {shown(unknown[0])}"
                             f"{did_you_mean(unknown[0], keys)}")  # fmt: skip
        return _resolve(found[0], kind, where)
    if kind == "video" and isinstance(source, (list, tuple)):
        return [_resolve(frame, "image", f"{where}, frame {i}") for i, frame in enumerate(source)]
    if not isinstance(source, str):
        return source
    if not source:
        raise InputError(f"{where}: the {kind} is an empty string; pass a path")
    scheme = scheme_of(source)
    if scheme == "data":
        return _from_data(source, kind, where)
    if scheme not in ("", "file"):
        raise InputError(f"{where}: {source[:80]!r} is a remote URL; nothing is fetched: download the {kind} first")
    return _local(source)


def _local(source: str) -> str:
    """A path, or the path of a file: URL."""
    if scheme_of(source) != "file":
        return source
    return unquote(re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", source))


def _from_data(url: str, kind: str, where: str) -> Any:
    """The bytes of a data: URL; a video of type video/jpeg holds its frames one after another, as in vLLM."""
    header, comma, data = url.partition(",")
    if not comma:
        raise InputError(f"{where}: the data: URL has no comma; write data:{kind}/...;base64,...")
    if not header.endswith(";base64"):
        return unquote_to_bytes(data)
    if kind == "video" and header.lower().startswith("data:video/jpeg"):
        return [_from_base64(unquote(frame), f"{where}, frame {i}") for i, frame in enumerate(data.split(","))]
    return _from_base64(unquote(data), where)


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
        if not isinstance(inner.get("arguments", 0), (dict, str, type(None))):
            raise InputError(f"{where}: tool call {i} has no 'arguments'; pass a dict or its JSON")
        if inner.get("arguments") is None:  # as some clients write a call without arguments
            inner = inner | {"arguments": {}}
        call = call | {"function": inner} if call.get("function") else inner
        call = {key: value for key, value in call.items() if value is not None}
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
    """A copy as plain JSON values; scalars of NumPy become numbers."""
    if depth_of(value) > MAX_DEPTH:
        raise InputError(
            f"{where} cannot be written as JSON: it is nested too deep; at most {MAX_DEPTH} levels are read"
        )
    _check_keys(value, where)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain_number)
        return json.loads(_text(text, where))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} cannot be written as JSON ({error}); give plain values") from None


def _plain_number(value: Any) -> Any:
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"a value of type {type(value).__name__}")


def _check_keys(value: Any, where: str) -> None:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    wrong = [key for key in value if not isinstance(key, str)] if isinstance(value, dict) else []
    if wrong:
        raise InputError(f"{where} has the key {str(wrong[0])[:40]} of type {type(wrong[0]).__name__}; names are text")
    for each in inner:
        _check_keys(each, where)


def _need(values: Any, key: str, where: str) -> Any:
    if not isinstance(values, dict) or values.get(key) is None:
        raise InputError(f"{where} has no {key!r}")
    return values[key]


def _only(part: dict, keys: tuple[str, ...], where: str) -> None:
    unknown = [key for key in part if key not in keys]
    if unknown:
        form = f"{where} of type {part['type']!r} has the unknown key"
        others = [kind for kind, names in OPTIONS.items() if unknown[0] in names]
        hint = f"; it belongs to {' and '.join(others)}" if others else did_you_mean(unknown[0], keys)
        raise InputError(f"{form} {shown(unknown[0])}{hint}")


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is of type {type(value).__name__}; give a string")
    return value


def _text(value: Any, what: str) -> str:
    """A string that can be written as UTF-8."""
    try:
        _string(value, what).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds half of a surrogate pair at character {error.start}; remove it") from None
    return value
