"""Rows in every form that people have, and what is wrong with others."""

import json
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.messages import read_conversation
from omni_jax.train.data.forms import COLUMNS, read_example

ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HERE = Path("/set")
CALL = {"name": "f", "arguments": {"x": 1}}


def image(path: str) -> dict[str, str]:
    return {"type": "image", "image": path}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("row, messages", [
    ({"messages": [ASKED, SAID]}, [ASKED, SAID]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASKED, SAID]),
    ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "system": "s"},
     [{"role": "system", "content": "s"}, ASKED, SAID]),
    ({"conversations": [ASKED, SAID]}, [ASKED, SAID]),
    # Calls and their results, in the roles of LLaMA-Factory and of ms-swift.
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)},
                        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}]},
     [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, SAID]),
    ({"messages": [ASKED, SAID, {"role": "tool_call", "content": json.dumps(CALL)},
                   {"role": "tool_call", "content": json.dumps(CALL)},
                   {"role": "tool_response", "content": "1"}, SAID]},
     [ASKED, SAID | {"tool_calls": [CALL, CALL]}, {"role": "tool", "content": "1"}, SAID]),
    # Media beside the texts.
    ({"messages": [{"role": "user", "content": "<image>see<image>"}, SAID], "images": ["a.png", "b/c.png"]},
     [{"role": "user", "content": [image("/set/a.png"), text("see"), image("/set/b/c.png")]}, SAID]),
    ({"conversations": [{"from": "human", "value": "<image>\n<audio>q"}, {"from": "gpt", "value": "a"}],
      "images": ["a.png"], "audios": "b.wav"},
     [{"role": "user", "content": [image("/set/a.png"), text("\n"), {"type": "audio", "audio": "/set/b.wav"},
                                   text("q")]}, SAID]),
    ({"messages": [ASKED, SAID], "image": "a.png"},
     [{"role": "user", "content": [image("/set/a.png"), text("q")]}, SAID]),
    ({"messages": [{"role": "user", "content": [{"type": "image"}, text("q")]}, SAID], "images": [{"bytes": b"x"}]},
     [{"role": "user", "content": [{"type": "image", "image": b"x"}, text("q")]}, SAID]),
    ({"messages": [{"role": "user", "content": [image("a.png"), text("q")]}, SAID]},
     [{"role": "user", "content": [image("/set/a.png"), text("q")]}, SAID]),
    # Text that only looks like a mark.
    ({"messages": [{"role": "user", "content": "what is <image>?"}, SAID]},
     [{"role": "user", "content": "what is <image>?"}, SAID]),
    ({"messages": [{"role": "user", "content": "<video> and <image>"}, SAID], "images": ["a.png"], "videos": []},
     [{"role": "user", "content": [text("<video> and "), image("/set/a.png")]}, SAID]),
], ids=lambda value: str(value)[:60])  # fmt: skip
def test_forms(row: dict[str, Any], messages: list) -> None:
    given = json.dumps(row, default=str)
    example = read_example(row, HERE)
    assert example.messages == messages and example.text is None and not example.silent
    assert json.dumps(row, default=str) == given and not COLUMNS.check(row)
    read_conversation(example.messages, example.tools)


def test_tools_and_reasoning() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    thought = SAID | {"reasoning_content": "r"}
    for given in (tools, json.dumps(tools)):
        example = read_example({"messages": [ASKED, thought], "tools": given}, HERE)
        assert example.tools == tools and example.messages[1] == thought
    assert read_example({"messages": [ASKED, SAID], "tools": []}, HERE).tools is None


def test_what_is_not_learned() -> None:
    messages = [ASKED, SAID | {"loss": False}, ASKED, SAID | {"loss": True}, ASKED, SAID | {"weight": 0}]
    example = read_example({"messages": messages, "system": "s"}, HERE)
    assert example.silent == {2, 6} and example.messages[4] == SAID


def test_plain_text() -> None:
    assert read_example({"text": "words"}, HERE).text == "words"


@pytest.mark.parametrize("row, why", [
    ({}, "the row has no conversation; give one of 'messages', 'conversations', 'text'"),
    ({"messages": [ASKED], "text": "a"}, r"the row has \['messages', 'text'\]; give one"),
    ({"messages": "q"}, "'messages' is of type str; give a list"),
    ({"messages": ["q"]}, "message 0 is of type str"),
    ({"messages": [{"role": "wizard", "content": "q"}]}, "message 0 has the role 'wizard'; roles are user, human"),
    ({"conversations": [{"from": "human", "value": "q"}, {"value": "a"}]}, "message 1 has the role None"),
    ({"messages": [ASKED, {"role": "tool_call", "content": "{x"}]}, "message 1: the call: no valid JSON"),
    ({"messages": [ASKED, {"role": "tool_call"}]}, "message 1: the call is of type NoneType"),
    ({"messages": [ASKED, SAID, {"role": "tool_call", "content": json.dumps(CALL), "loss": False}]},
     "calls are learned with their reply; give all of one reply the same 'loss'"),
    ({"messages": [{"role": "system", "content": "s"}, ASKED], "system": "s"}, "'system' is stated twice"),
    ({"messages": [ASKED, SAID | {"loss": "no"}]}, "message 1: 'loss' is 'no'; give true or false"),
    ({"messages": [ASKED | {"loss": True}, SAID]}, "message 0 of the role 'user' has 'loss'"),
    ({"messages": [{"role": "user", "content": "<image>"}], "images": ["a", "b"]},
     "the row lists 2 as 'images', and its texts hold <image> 1 times"),
    ({"messages": [SAID], "images": ["a"]}, "the row has 'images' and no question"),
    *(({"messages": [{"role": "user", "content": [part, text("q")]}, SAID], "images": ["a"]},
       "the row has 'images', and its messages name theirs already; give each once")
      for part in (image("a"), {"type": "image_url", "image_url": {"url": "a"}})),
    ({"messages": [ASKED, SAID], "images": ["a"], "image": "b"}, "the row has 'image' and 'images'; give"),
    ({"messages": [ASKED, SAID], "tools": "["}, "'tools': no valid JSON"),
    ({"messages": [ASKED, SAID], "tools": 3}, "'tools' is of type int; give a list"),
    ({"text": ""}, "'text' is empty"),
    ({"text": "a", "images": ["a.png"]}, "'images' is beside 'text'"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": {"x": 1}}]}]}, "'image' holds"),
], ids=lambda value: str(value)[:60])  # fmt: skip
def test_what_is_no_example(row: dict, why: str) -> None:
    with pytest.raises(InputError, match=why):
        read_example(row, HERE)


@pytest.mark.parametrize("row, why", [
    ({"messages": [ASKED], "imagess": ["a"]}, "the column 'imagess' is not read; write 'images' if"),
    ({"messages": [ASKED], "image_path": "a"}, "the column 'image_path' is not read; write its part of the messages"),
    ({"conversations": [ASKED], "video_url": "a"}, "write 'videos', which may be a list"),
    ({"mesages": [ASKED]}, "write 'messages' if"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_columns_that_would_be_lost(row: dict, why: str) -> None:
    with pytest.raises(InputError, match=why):
        COLUMNS.check(row)
    assert COLUMNS.check({"messages": [ASKED], "source": "x", "origin": "y", "score": 1}) == {"origin", "score"}
