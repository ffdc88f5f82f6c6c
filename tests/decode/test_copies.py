"""Several replies to one conversation: each is what its own seed gives alone, and the prompt is run once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.decode import engine
from omni_jax.errors import InputError
from omni_jax.omni import Omni, Reply
from omni_jax.weights.drafters import load_drafter
from tests.parity import audio_part, image_part, user

ASKED = [user("Just words."), user(image_part(60, 80, 1), audio_part(1.2, 5), "Both, and more words.")]
SETTINGS = {"max_new_tokens": 10, "stop_ids": (), "temperature": 1.0, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def omni(omnis: Callable[[str], Omni]) -> Omni:
    return omnis("tiny")


def ids(replies: Any) -> list[list[int]]:
    return [reply.token_ids for reply in replies]


@pytest.fixture(scope="module")
def alone(omni: Omni) -> dict[int, list[list[int]]]:
    return {
        seed: ids(omni.generate(messages, seed=seed, **SETTINGS) for messages in ASKED) for seed in (5, 6, 7, 9, 10)
    }


def test_reply_i_is_that_of_seed_plus_i(
    omni: Omni, alone: dict[int, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    prefill = engine.prefill
    monkeypatch.setattr(
        engine, "prefill", lambda p, r, *a, **k: rows.append(len(r.token_ids)) or prefill(p, r, *a, **k)
    )
    assert ids(omni.generate(ASKED[1], n=3, seed=5, **SETTINGS)) == [alone[seed][1] for seed in (5, 6, 7)]
    first, second = omni.generate(ASKED, n=2, seed=[6, 9], **SETTINGS)
    assert ids(first) == [alone[6][0], alone[7][0]] and ids(second) == [alone[9][1], alone[10][1]]
    assert rows == [1, 2], "a prompt is run once"
    assert len({tuple(row) for row in ids(first)}) == 2


def test_one_is_a_list_too(omni: Omni, alone: dict[int, list[list[int]]]) -> None:
    assert isinstance(omni.generate(ASKED[0], seed=5, **SETTINGS), Reply)
    assert ids(omni.generate(ASKED[0], seed=5, n=1, **SETTINGS)) == [alone[5][0]]
    greedy = omni.generate(ASKED[0], n=np.int64(1), max_new_tokens=3)
    assert len(greedy) == 1


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_drafted(
    kind: str, omni: Omni, alone: dict[int, list[list[int]]], drafters: Callable[[str, str], Path]
) -> None:
    drafter = load_drafter(drafters(kind, "tiny"))
    got = omni.generate(ASKED, n=2, seed=[6, 9], drafter=drafter, draft_tokens=3, **SETTINGS)
    assert [ids(replies) for replies in got] == [[alone[6][0], alone[7][0]], [alone[9][1], alone[10][1]]]


def test_spoken(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    settings = {**SETTINGS, "speech": True, "max_frames": 5, "max_new_tokens": 6}
    got = omni.generate(ASKED, n=2, seed=6, speaker=["ethan", "vera"], **settings)
    for replies, messages, speaker in zip(got, ASKED, ("ethan", "vera"), strict=True):
        want = omni.generate(messages, seed=7, speaker=speaker, **settings)
        assert replies[1].token_ids == want.token_ids != replies[0].token_ids
        np.testing.assert_array_equal(replies[1].codes, want.codes)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n": 0, "temperature": 1.0}, "n is 0"),
        ({"n": 2.0, "temperature": 1.0}, r"n is 2\.0"),
        ({"n": 3}, "greedy replies are all the same"),
        ({"n": 2, "temperature": 1.0, "seed": 2**63 - 1}, "seed is 9223372036854775807; .* 2"),
    ],
)
def test_wrong_numbers_are_named(settings: dict[str, Any], message: str, omni: Omni) -> None:
    with pytest.raises(InputError, match=message):
        omni.generate(ASKED[0], **settings)


def test_streams_and_slots_give_one(omni: Omni) -> None:
    for call in (omni.stream, omni.generate_many):
        with pytest.raises(InputError, match="has no 'n'; generate gives several"):
            call(ASKED[0], n=2)  # type: ignore[call-arg]
