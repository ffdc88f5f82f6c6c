"""Reading one section: what a range holds, how a dataclass describes its keys, and how messages show values."""

from dataclasses import dataclass
from math import inf, nan
from typing import Annotated, Any

import pytest

from omni_jax.errors import ConfigError
from omni_jax.reader import Range, Reader, is_one_of, shown

Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Encoder:
    width: Annotated[int, Range(1, 100)]
    layers: Annotated[int, Range(0, 9), "depth"]
    share: Share
    renamed: Annotated[Share, "part"]
    rates: Annotated[tuple[int, ...], Range(1, 5)]
    mean: Annotated[tuple[float, float], Range(-1, 1)]
    derived: int


STATED = {
    "width": 7,
    "depth": 0,
    "share": 1,
    "part": 0.5,
    "rates": [5, 1],
    "mean": [0, -1.0],
    "derived": 3,
    "more": "x",
}


@pytest.mark.parametrize("value", [nan, inf, -inf, True, None, "5", [5], 10**400, -1e-320, 1.0000001])
def test_what_no_range_holds(value: Any) -> None:
    assert not Range(0, 1).holds(value)


def test_a_range_holds_both_its_ends() -> None:
    assert all(Range(0, 1).holds(value) for value in (0, 1, 0.0, 1.0, 1e-320))


def test_fields_are_read_under_their_keys_and_in_their_types() -> None:
    fields = Reader(STATED, "encoder").fields(Encoder)
    assert fields == {"width": 7, "layers": 0, "share": 1.0, "renamed": 0.5, "rates": (5, 1), "mean": (0.0, -1.0)}
    assert isinstance(fields["share"], float) and all(isinstance(x, float) for x in fields["mean"])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("width", 0, "'encoder.width' is 0, not a positive count of at most 100"),
        ("width", 101, "'encoder.width' is 101, not a positive count of at most 100"),
        ("width", 7.0, "'encoder.width' is 7.0, not of type int"),
        ("width", True, "'encoder.width' is True, not of type int"),
        ("depth", 10, "'encoder.depth' is 10, not a number from 0 to 9"),
        ("part", nan, "'encoder.part' is nan, not a number from 0 to 1"),
        ("share", "1", "'encoder.share' is '1', not of type int or float"),
        ("rates", [1, 6], "'encoder.rates' is [1, 6], not a list of numbers from 1 to 5, all whole"),
        ("rates", [1.0], "'encoder.rates' is [1.0], not a list of numbers from 1 to 5, all whole"),
        ("mean", [0], "'encoder.mean' is [0], not 2 numbers from -1 to 1"),
        ("mean", [0, True], "'encoder.mean' is [0, True], not 2 numbers from -1 to 1"),
        ("mean", 0, "'encoder.mean' is 0, not of type list or tuple"),
    ],
)
def test_wrong_fields_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Reader({**STATED, key: value}, "encoder", "a.json").fields(Encoder)
    assert str(raised.value) == f"a.json: {message}"


def test_what_may_be_absent() -> None:
    r = Reader({"a": None, "b": 0}, "")
    assert [r.read(name, Share, 0.5) for name in "abc"] == [0.5, 0.0, 0.5]
    with pytest.raises(ConfigError, match="'c' is missing"):
        r.read("c", Share)
    assert r.flag("a", absent=True) and not r.flag("c", absent=False)
    with pytest.raises(ConfigError, match="'b' is 0, not of type bool"):
        r.flag("b", absent=True)


def test_a_switch_takes_no_number_for_true() -> None:
    assert is_one_of(1.0, [1]) and is_one_of(None, [None]) and not is_one_of(True, [1]) and not is_one_of(0, [False])
    Reader({"a": 1.0}, "").expect("a", 1)
    with pytest.raises(ConfigError, match=r"'a' is True; supported: \[1\]"):
        Reader({"a": True}, "").expect("a", 1)


def test_values_are_shown_up_to_a_length() -> None:
    assert shown("x" * 78) == repr("x" * 78)
    assert shown("x" * 79) == "'" + "x" * 79 + "... (81 characters)"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(10**5000) == "a value of type int, too large to show"
    assert shown(deep) == "a value of type list, too large to show"
