"""Settings are numbers of Python from the call on, whatever library they come from."""

import inspect
import warnings
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.decode.arguments import explained
from omni_jax.decode.limits import Limits, seeds_of, stop_ids_of
from omni_jax.decode.request import Request
from omni_jax.decode.sampling import Sampling
from omni_jax.errors import InputError
from omni_jax.inputs.values import flag, is_whole, number_of, whole
from omni_jax.settings import NAMES, Keywords, Settings, Voice, meanings


@pytest.mark.parametrize(
    "five", [5, np.int64(5), np.uint8(5), np.array(5), jnp.int32(5)], ids=lambda x: type(x).__name__
)
def test_whole_numbers(five: Any) -> None:
    assert type(whole("n", five, "")) is int and is_whole(five)
    assert type(Voice(max_frames=five).max_frames) is int
    made = Sampling(1.0, top_k=five, logprobs=five)
    assert made == Sampling(1.0, top_k=5, logprobs=5) and type(made.logprobs) is type(made.top_k) is int
    assert seeds_of(five, 2) == [5, 5] and stop_ids_of([five], 10).tolist() == [5]


@pytest.mark.parametrize(
    "half", [np.float16(0.5), np.float32(0.5), np.array(0.5), jnp.float32(0.5), np.longdouble(0.5)]
)
def test_numbers(half: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Sampling(temperature=half, top_p=half)
    assert (
        made == Sampling(temperature=0.5, top_p=0.5) and type(made.temperature) is type(number_of("x", half)) is float
    )


@pytest.mark.parametrize("wrong", [True, np.bool_(True), np.array(True), jnp.bool_(True), np.ones(1), "5", None])
def test_what_is_no_number(wrong: Any) -> None:
    assert not is_whole(wrong)
    with pytest.raises(InputError, match="must be a number"):
        number_of("x", wrong)


def test_flags() -> None:
    assert all(flag("x", yes) is True for yes in (True, np.bool_(True), np.array(True), jnp.bool_(True)))


@pytest.mark.parametrize("since", range(8))
def test_reports_of_the_last_tokens_read_the_last_chunks(since: int) -> None:
    request = Request(5, Limits(9))
    chunks = [np.arange(first, first + n)[:, None] for first, n in ((0, 1), (1, 4), (5, 0), (5, 2))]
    request.token_ids, request._reports = list(range(7)), chunks
    assert request.reports(since)[:, 0].tolist() == list(range(since, 7))
    if since in (5, 6, 7):
        request._reports = [np.zeros((5, 2)), *chunks[3:]]
        assert request.reports(since)[:, 0].tolist() == list(range(since, 7)), "earlier ones do not even fit"


@explained
def asked(messages: str, *, n: int | None = None, **settings: Unpack[Keywords]) -> dict:
    """Answer.

    n: several.
    """
    return {"messages": messages, "n": n, **Settings.read(settings).keywords()}


def test_a_function_that_takes_settings_shows_them_all() -> None:
    shown = inspect.signature(asked).parameters
    assert list(shown) == ["messages", "n", *NAMES]
    assert all(one.kind is one.KEYWORD_ONLY for name, one in shown.items() if name != "messages")
    assert shown["speech_top_k"].default == 50 and shown["stop"].annotation == Keywords.__annotations__["stop"]
    assert asked("Hi", n=2, top_k=3) == {"messages": "Hi", "n": 2, **Settings.read({"top_k": 3}).keywords()}


def test_its_docstring_lists_them_one_by_one() -> None:
    lines = (asked.__doc__ or "").splitlines()
    assert lines[:5] == ["Answer.", "", "n: several.", "", "Settings:"] and all(len(line) <= 110 for line in lines)
    assert [line.split(":")[0] for line in lines[5:] if not line.startswith(" ")] == list(NAMES)
    text = " ".join(line.strip() for line in lines)
    assert all(f"{name}: {meaning}" in text for name, meaning in meanings().items())


@pytest.mark.parametrize(
    "name, why",
    [("max_tokens", "it is called max_new_tokens here"), ("temprature", "did you mean temperature"), ("x", "leave it")],
)
def test_a_setting_that_there_is_not(name: str, why: str) -> None:
    with pytest.raises(InputError, match=f"asked has no '{name}'; {why}"):
        asked("Hi", **{name: 5})  # type: ignore[arg-type]
