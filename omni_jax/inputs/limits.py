"""The limits of a chat template: time, memory, output.

A template is a program that comes with a checkpoint. `sandbox` runs it within these limits by two rules, which work on
every thread and need no other process:

- No single operation takes long, because `operations` checks beforehand how large its result would be.
- Between two operations, the time and the total size of all values held are checked: at each iteration of a loop, each
  call, filter, test, comparison, operator and output. Values that only the budget still refers to do not count.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

SECONDS = 10  # for one rendering; real templates take milliseconds
MAX_VALUE = 32_000_000  # characters of one value including its elements; the finished prompt is one value
MAX_HELD = 256_000_000  # characters of all values that one rendering holds at once, including its output
MAX_CALLS = 60  # depth of nested macros, blocks and recursive loops
MAX_BITS = 10_000  # of a whole number
ELEMENT = 32  # characters that an element of a list or dict counts as, for the memory it takes
LARGE = 1000  # values of at least this many characters are tracked until they are dropped
ESCAPED = 12  # the most characters that one may become in JSON, in the text of a list or in a URL

DATA = (str, list, tuple, dict, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


class LimitError(Exception):
    """A limit was exceeded; the message continues a sentence whose subject is the template."""


def _pop(held: dict[int, tuple[Any, int]], key: int) -> tuple[Any, int, int]:
    """A held value, its size, and how many references to it are left."""
    value, size = held.pop(key)
    return value, size, sys.getrefcount(value)


_UNHELD = _pop({0: ("".join(("a", "b")), 0)}, 0)[2]  # the count for a value that nothing else refers to


class _Budget:
    """The time and characters that one rendering has left."""

    def __init__(self) -> None:
        self.deadline, self.left, self.calls = monotonic() + SECONDS, MAX_HELD, 0
        self._held: dict[int, tuple[Any, int]] = {}  # large values, by their id

    def take(self, size: int, value: Any) -> None:
        """Count a value once; a small one is counted forever."""
        if size >= LARGE and id(value) not in self._held:
            self._held[id(value)] = value, size
            self.left -= size
        elif size < LARGE:
            self.left -= size

    def reclaim(self) -> None:
        """Stop counting the values that the template has dropped."""
        for key in list(self._held):
            value, size, references = _pop(self._held, key)
            if references > _UNHELD:
                self._held[key] = value, size
            else:
                self.left += size


_BUDGET: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def limits() -> Iterator[None]:
    """In this context, the work of templates on this thread uses up one budget; LimitError when it is exhausted."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def spend(size: int, value: Any = None) -> None:
    """Count `size` characters that were made, for as long as `value` is held, and check the time."""
    check_value(size)
    budget = _BUDGET.get()
    if value is None:
        budget.left -= size
    else:
        budget.take(size, value)
    allow(0)


def check_value(size: int) -> None:
    """Raise LimitError for a value of more characters than any may have."""
    if size > MAX_VALUE:
        raise LimitError(f"it makes a value of more than {MAX_VALUE:,} characters")


def allow(size: int) -> None:
    """Check the time, and that `size` more characters may be made; called before they are made."""
    budget = _BUDGET.get()
    if monotonic() > budget.deadline:
        raise LimitError(f"it runs for more than {SECONDS} seconds")
    if size > budget.left:
        budget.reclaim()
    if size > budget.left:
        raise LimitError(f"it makes and holds more than {MAX_HELD:,} characters at once")


def weight(value: Any) -> int:
    """The characters of a value including its elements, counted until they exceed MAX_VALUE."""
    total, stack = 0, [value]
    while stack and total <= MAX_VALUE:
        item = stack.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, dict):
            total += 2 * ELEMENT * len(item)
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, DATA):
            total += ELEMENT * len(item)
            stack += item
        else:
            total += ELEMENT
    return total


def made(value: Any) -> Any:
    """Count the result of an operation, and return it; an iterator is counted while it runs."""
    if isinstance(value, str):
        spend(len(value), value)
    elif isinstance(value, DATA):
        spend(weight(value), value)
    elif isinstance(value, Iterator):
        return _counted(value)
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise LimitError(f"it computes a number of more than {MAX_BITS:,} bits")
    else:
        allow(0)
    return value


def _counted(values: Iterator[Any]) -> Iterator[Any]:
    for n, value in enumerate(values):
        if n * ELEMENT > MAX_VALUE:
            raise LimitError(f"it makes a list of more than {MAX_VALUE // ELEMENT:,} elements")
        allow(0)
        yield value


def nested(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """The result of a call from a template; LimitError if too many calls are nested."""
    budget = _BUDGET.get()
    if budget.calls >= MAX_CALLS:
        raise LimitError(f"it has more than {MAX_CALLS} calls within each other")
    budget.calls += 1
    try:
        return function(*args, **named)
    finally:
        budget.calls -= 1


def text_of(value: Any) -> str:
    """`str(value)`, whose size is checked first: that of a list or dict is longer than its elements."""
    if isinstance(value, str):
        return value
    allow(ESCAPED * weight(value))
    return str(value)


def joined(*values: Any) -> str:
    """Jinja's operator `~`: the texts of the values, concatenated."""
    texts = [text_of(value) for value in values]
    allow(sum(map(len, texts)))
    return made("".join(texts))
