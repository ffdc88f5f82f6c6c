"""Rows of training data as examples, in the forms that people have.

    messages                 of OpenAI, Qwen and ms-swift: texts, or lists of parts; tool_calls, reasoning
    conversations            of ShareGPT and LLaMA-Factory: {"from": "human", "value": ...}
    text                     plain text, every token of which is learned
    images, audios, videos   beside either of the first two: media for `<image>`, `<audio>` and `<video>` in texts, or
                             for parts without a source; without any for a kind, its media open the first question
    system, tools            beside either of the first two; tools may be JSON in a string

A message with "loss": false (or "weight": 0, as OpenAI has it) is not learned. Paths are relative to the row's file.
`<image>` in a row without images is text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.files import parse_json
from omni_jax.inputs.messages import KINDS
from omni_jax.rows.columns import Columns
from omni_jax.rows.media import located

# What `train.regenerate` writes beside the messages.
REGENERATED = ("source", "token_ids", "finish_reasons")
FORMS = ("messages", "conversations", "text")
COLUMNS = Columns(
    groups=(FORMS,),
    media={kind: f"{kind}s" for kind in KINDS},
    others=("system", "tools"),
    free=("id", "image", "audio", "video", *REGENERATED),
)
# What formats call the roles.
_ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "tool_response": "tool",
    "function_response": "tool",
}  # fmt: skip
_KEYS = {"from": "role", "value": "content"}
_LEARNED = ("loss", "weight")  # of a message: whether it is learned
_CALLS = ("function_call", "tool_call")  # roles of a reply whose text is the JSON of one call, or of several


@dataclass(frozen=True, eq=False)
class Example:
    """One row: a conversation, or a text.

    messages: as `read_conversation` takes them. silent: numbers of messages that are not learned. text: None for a
    conversation.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    silent: frozenset[int] = frozenset()
    text: str | None = None


def read_example(row: dict[str, Any], folder: Path) -> Example:
    """The example of a row without nulls; `folder` is that of its file. InputError for what has no such form."""
    forms = [form for form in FORMS if form in row]
    if len(forms) != 1:
        raise InputError(f"the row has {forms or 'no conversation'}; give one of {', '.join(map(repr, FORMS))}")
    if forms == ["text"]:
        return Example([], text=_text_of(row))
    turns = row[forms[0]]
    if not isinstance(turns, list):
        raise InputError(f"{forms[0]!r} is of type {type(turns).__name__}; give a list of messages")
    messages = _with_system(row, _joined(_message(turn, f"message {i}") for i, turn in enumerate(turns)))
    silent = frozenset(i for i, message in enumerate(messages) if not _learned(message, f"message {i}"))
    _place_media(messages, {kind: sources for kind in KINDS if (sources := _sources(row, kind))})
    return Example(located(messages, folder), _tools(row), silent)


def _text_of(row: dict[str, Any]) -> str:
    extra = [name for name in (*COLUMNS.media.values(), *KINDS, "system", "tools") if row.get(name)]
    if extra:
        raise InputError(f"{extra[0]!r} is beside 'text', which is plain text; write a conversation as 'messages'")
    if not isinstance(row["text"], str) or not row["text"]:
        raise InputError("'text' is empty, or no text; give the text to learn")
    return row["text"]


def _message(turn: Any, where: str) -> dict[str, Any]:
    """A message with the role and keys of OpenAI's, from any form; a new dict."""
    if not isinstance(turn, dict):
        raise InputError(f"{where} is of type {type(turn).__name__}; write {{'role': ..., 'content': ...}}")
    message: dict[str, Any] = {_KEYS.get(str(key), str(key)): value for key, value in turn.items()}
    role = message.get("role")
    if role in _CALLS:
        calls = _json(message.pop("content", None), f"{where}: the call")
        return message | {
            "role": "assistant",
            "content": "",
            "tool_calls": calls if isinstance(calls, list) else [calls],
        }
    if role not in _ROLES:
        raise InputError(f"{where} has the role {role!r}; roles are {', '.join((*_ROLES, *_CALLS))}")
    return message | {"role": _ROLES[role]}


def _joined(messages: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages; calls that follow a reply, each as a message of its own, are calls of that reply."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        alone = message["role"] == "assistant" and not message.get("content") and message.get("tool_calls")
        if alone and joined and joined[-1]["role"] == "assistant":
            if any(message.get(key, True) != joined[-1].get(key, True) for key in _LEARNED):
                raise InputError("calls are learned with their reply; give all of one reply the same 'loss'")
            joined[-1]["tool_calls"] = [*joined[-1].get("tool_calls", []), *message["tool_calls"]]
        else:
            joined.append(message)
    return joined


def _with_system(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not row.get("system"):
        return messages
    if any(message["role"] == "system" for message in messages[:1]):
        raise InputError("'system' is stated twice, as a column and as the first message; leave one out")
    return [{"role": "system", "content": row["system"]}, *messages]


def _learned(message: dict[str, Any], where: str) -> bool:
    """Whether a message is learned as far as its row says; takes the keys that say so out of it."""
    said = [(key, message.pop(key)) for key in _LEARNED if key in message]
    for key, value in said:
        if value not in (0, 1):
            raise InputError(f"{where}: {key!r} is {value!r}; give true or false, or 1 or 0")
        if value and key == "loss" and message["role"] != "assistant":
            raise InputError(
                f"{where} of the role {message['role']!r} has 'loss': only replies of the assistant are learned"
            )
    return all(value for _, value in said)


def _sources(row: dict[str, Any], kind: str) -> list[Any]:
    """The media of a kind that are listed beside the messages."""
    several, one = row.get(f"{kind}s") or [], row.get(kind) or []
    if several and one:
        raise InputError(f"the row has {kind!r} and '{kind}s'; give '{kind}s' alone")
    found = several or one
    return found if isinstance(found, list) else [found]


def _place_media(messages: list[dict[str, Any]], sources: dict[str, list[Any]]) -> None:
    """Put media in the places of their marks, in order; without a mark, before the text of the first question."""
    if not sources:
        return
    marks = re.compile(f"<({'|'.join(sources)})>")
    parts = [_parts(message, marks) for message in messages]
    for kind, listed in sources.items():
        places = [part for some in parts for part in some if part.get("type") == kind and len(part) == 1]
        if not places:
            if any(kind in str(part.get("type")) for some in parts for part in some):
                raise InputError(f"the row has '{kind}s', and its messages name theirs already; give each once")
            opening = next((some for some, m in zip(parts, messages, strict=True) if m["role"] == "user"), None)
            if opening is None:
                raise InputError(
                    f"the row has '{kind}s' and no question that they belong to; write <{kind}> into a text"
                )
            places = [{"type": kind} for _ in listed]
            opening[:0] = places
        if len(places) != len(listed):
            raise InputError(
                f"the row lists {len(listed)} as '{kind}s', and its texts hold <{kind}> {len(places)} times"
            )
        for part, source in zip(places, listed, strict=True):
            part[kind] = source
    for message, some in zip(messages, parts, strict=True):
        if any(part.get("type") != "text" for part in some):
            message["content"] = some


def _parts(message: dict[str, Any], marks: re.Pattern) -> list[dict[str, Any]]:
    """The content of a message as parts, in which a mark is a part without a source."""
    content = message.get("content")
    given = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for part in given:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            parts.append(dict(part) if isinstance(part, dict) else {"type": part})
            continue
        pieces = marks.split(part["text"])
        parts += [{"type": piece} if i % 2 else part | {"text": piece} for i, piece in enumerate(pieces) if piece]
    return parts


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = row.get("tools") or None
    tools = _json(tools, "'tools'") if isinstance(tools, str) else tools
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"'tools' is of type {type(tools).__name__}; give a list of JSON schemas")
    return tools or None


def _json(value: Any, what: str) -> Any:
    if isinstance(value, dict | list):
        return json.loads(json.dumps(value))
    if not isinstance(value, str):
        raise InputError(f"{what} is of type {type(value).__name__}; give JSON in a string")
    return parse_json(value, what, error=InputError)
