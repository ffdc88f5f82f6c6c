"""Values in errors: as Python writes them, short, and as quick for a large one."""

import time

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.messages import read_conversation
from omni_jax.inputs.values import SHOWN, shown


@pytest.mark.parametrize(
    "value",
    [None, True, 7, 0.5, "it's", b"a", [], {}, (), [1, [2, []], {"a": (1,), 3: {}}], {"a": [None]}, {1}, np.arange(3),
     "x" * 78, [1] * 26, [[1] * 10] * 2, {"type": "function", "function": {"name": "a name", "strict": False}}],
)  # fmt: skip
def test_short_values_are_as_python_writes_them(value):
    assert len(repr(value)) <= SHOWN and shown(value) == repr(value)


@pytest.mark.parametrize("value", ["x" * 79, b"x" * 90, [1] * 27, {"a": ["b" * 40, "c" * 40]}, [[["deep"] * 20]]])
def test_long_values_are_cut(value):
    assert shown(value) == f"{repr(value)[:60]}... (type {type(value).__name__})"


def test_what_cannot_be_written_has_its_type():
    assert shown(object()) == "of type object" and shown([object()]) == "of type list" and shown(int) == "of type type"
    endless: list = []
    endless.append(endless)
    assert shown(endless).startswith("[[[[")


@pytest.mark.parametrize("value", [[0.5] * 1_000_000, {i: i for i in range(1_000_000)}, "x" * 50_000_000])
def test_large_values_take_no_time(value):
    start = time.process_time()
    assert len(shown([value])) < 100
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize(
    "message",
    [
        {"role": "x" * 400_000, "content": ""},
        {"role": "user", "content": "", "y" * 400_000: 1},
        {"role": "user", "content": [{"type": ["text"] * 400_000}]},
        {"role": "user", "content": [{"type": "text", "text": "", "z" * 400_000: 1}]},
    ],
    ids=["role", "key", "type", "key of a part"],
)
def test_errors_of_messages_are_short(message):
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        read_conversation([message])
    assert len(str(caught.value)) < 300 and time.process_time() - start < 0.2
