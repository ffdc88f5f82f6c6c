"""Calls of tools in a reply's text: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`, as the templates have it.

What is not the JSON of a call stays text, marks included, so that nothing that the model wrote is lost.
"""

import json
from dataclasses import dataclass

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A call of a function; arguments: JSON text of an object."""

    name: str
    arguments: str


class CallSplitter:
    """Splits a reply's text as it comes into what is said and what is called; the same for any cut."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = self._called = False

    def add(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """The text and the calls that the next piece completes; `last`: nothing follows."""
        self._held += text
        said, calls = "", list[Call]()
        while True:
            if self._inside:
                end = self._held.find(CLOSE)
                if end < 0 and not last:
                    return said, calls
                inner, self._held = self._cut(end, CLOSE)
                self._inside = False
                if (call := read_call(inner)) is not None:
                    calls.append(call)
                    self._called = True
                else:
                    said += OPEN + inner + (CLOSE if end >= 0 else "")
            start = self._held.find(OPEN)
            if start < 0:
                return said + self._certain(last), calls
            before, self._held = self._cut(start, OPEN)
            said += self._outside(before).rstrip()
            self._inside = True

    def _cut(self, at: int, mark: str) -> tuple[str, str]:
        """What is held before and after a mark at a place; all of it, and nothing, if that is negative."""
        return (self._held, "") if at < 0 else (self._held[:at], self._held[at + len(mark) :])

    def _certain(self, last: bool) -> str:
        """What no later text makes a part of a call, or of the space around one."""
        keep = 0
        if not last:
            begun = next(n for n in range(len(OPEN) - 1, -1, -1) if self._held.endswith(OPEN[:n]))
            shown = self._held[: len(self._held) - begun]
            keep = len(self._held) - len(shown.rstrip())
        cut = len(self._held) - keep
        taken, self._held = self._held[:cut], self._held[cut:]
        return self._outside(taken)

    def _outside(self, text: str) -> str:
        """Text outside of calls, without the space that follows one."""
        if self._called:
            text = text.lstrip()
            self._called = not text
        return text


def read_call(text: str) -> Call | None:
    """The call that a text states as JSON; None if it is none, or cannot be sent as one.

    Arguments are written in ASCII, so that half of a surrogate pair in them stays what it is.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, allow_nan=False)
        if not isinstance(arguments, str):
            return None
        (value["name"] + arguments).encode()
    except (ValueError, RecursionError):  # no JSON; a number that JSON cannot state; half of a surrogate pair
        return None
    return Call(value["name"], arguments)
