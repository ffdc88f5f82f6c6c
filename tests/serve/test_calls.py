"""Calls of tools in a text: found whole however it is cut, and nothing else is taken for one."""

import pytest

from omni_jax.serve.calls import Call, CallSplitter, read_call

ONE = '<tool_call>\n{"name": "f", "arguments": {"a": "b<c>"}}\n</tool_call>'
CASES = [
    ("Hello", "Hello", []),
    ("  two words \n", "  two words \n", []),
    (ONE, "", [("f", '{"a": "b<c>"}')]),
    (f"I look.\n\n{ONE}", "I look.", [("f", '{"a": "b<c>"}')]),
    (f"{ONE}\n{ONE}\nDone.", "Done.", [("f", '{"a": "b<c>"}')] * 2),
    ('<tool_call>{"name": "g"}', "", [("g", "{}")]),
    ("<tool_call>no json</tool_call> x", "<tool_call>no json</tool_call> x", []),
    ("<tool_call>cut", "<tool_call>cut", []),
    ("a <tool_ call> b", "a <tool_ call> b", []),
    ("a <tool_", "a <tool_", []),
    ('<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>', "", [("f", r'{"a": "\ud83d"}')]),
    ('<tool_call>{"name": "\\ud83d"}</tool_call>', '<tool_call>{"name": "\\ud83d"}</tool_call>', []),
]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("text, said, calls", CASES)
def test_calls_in_a_text(text, said, calls, size):
    splitter, got, found = CallSplitter(), "", []
    for start in range(0, len(text), size):
        piece, new = splitter.add(text[start : start + size], last=start + size >= len(text))
        got, found = got + piece, found + new
    assert got == said and found == [Call(*call) for call in calls]


def test_text_is_not_held_back_for_long():
    splitter = CallSplitter()
    assert splitter.add("Hello <") == ("Hello", []) and splitter.add("b") == (" <b", [])


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"name": 3}', '{"name": "f", "arguments": 3}', "[" * 100_000,
     '{"name": "f", "arguments": {"a": NaN}}', '{"name": "f", "arguments": {"a": 1e999}}',
     r'{"name": "f", "arguments": "\ud83d"}'],
)  # fmt: skip
def test_what_is_no_call(text):
    assert read_call(text) is None


def test_arguments_that_are_text_already():
    assert read_call('{"name": "f", "arguments": "{\\"a\\": 1}"}') == Call("f", '{"a": 1}')
