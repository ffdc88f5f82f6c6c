"""A request whose caches would not fit is refused before they are made, with the plan, what there is and the remedy."""

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest

from omni_jax.decode import memory
from omni_jax.decode.memory import Cache, available, check_memory, weight_bytes
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.placement import GROWTH
from tests.parity import user


@pytest.fixture
def omni(omnis: Callable[[str], Omni]) -> Omni:
    return omnis("tiny")


def with_memory(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    monkeypatch.setattr(memory, "usable", lambda device: int(gigabytes * 1e9))


def test_a_cache_is_planned_as_it_is_made(omni: Omni) -> None:
    text = omni.config.thinker.text
    made = 2 * text.num_layers * 3 * text.num_kv_heads * 512 * text.head_dim * 4
    planned = Cache("thinker", text, 3, 300).bytes(omni.params, None)
    assert planned == int(GROWTH * made) + made // 3
    assert Cache("thinker", text, 3, 300).bytes({"thinker": {}}, None) == planned // 2, "nothing is known of the type"


def test_what_there_is(omni: Omni) -> None:
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.85 * host < available(None) < 0.95 * host, "CPUs do not state theirs: it is the host's"
    params = omni.params["thinker"]
    assert weight_bytes(params) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_a_device_that_states_its_memory(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    text, weights = omni.config.thinker.text, weight_bytes(omni.params["thinker"])
    need = Cache("thinker", text, 4, 1000).bytes(omni.params, None)
    here = {"thinker": omni.params["thinker"]}
    monkeypatch.setattr(memory, "usable", lambda device: weights + need)
    check_memory([Cache("thinker", text, 4, 1000)], here, {"thinker": None}, "have fewer")
    monkeypatch.setattr(memory, "usable", lambda device: weights + need - 1)
    with pytest.raises(InputError, match=r"4 rows of up to 1,000 tokens .*have fewer: at most about 3 rows"):
        check_memory([Cache("thinker", text, 4, 1000)], here, {"thinker": None}, "have fewer")


@pytest.mark.parametrize(
    "door, settings, words",
    [
        ("generate", {"n": 30, "temperature": 1.0}, "30 rows"),
        ("generate", {"max_new_tokens": 30_000}, "30,0"),
        ("stream", {"max_new_tokens": 30_000}, "lower max_new_tokens:"),
        ("generate", {"speech": True, "max_frames": 30_000}, "(talker)"),
        ("generate_many", {"slots": 30}, "30 rows"),
        ("generate_many", {"slots": 10**9}, "1,000,000,000 rows"),
    ],
)
def test_requests_that_do_not_fit(
    door: str, settings: dict[str, Any], words: str, omni: Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, (sum(map(weight_bytes, omni.params.values())) + 20e6) / 1e9)
    messages = [user("Hi")] if door == "generate_many" else user("Hi")
    with pytest.raises(InputError) as refused:
        getattr(omni, door)(messages, **settings)
    assert words in str(refused.value) and "beside the weights" in str(refused.value)


def test_a_prompt_that_all_slots_would_have_to_hold(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, (sum(map(weight_bytes, omni.params.values())) + 20e6) / 1e9)
    answers = omni.generate_many([user("Hi"), user("word " * 4000)], slots=3, max_new_tokens=3)
    with pytest.raises(InputError, match="3 rows of up to 16,"):
        list(answers)
