"""Prompts that go on from what is kept: the same replies, and only new tokens run."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.decode import keeping
from omni_jax.decode import media as encoders
from omni_jax.decode.keeping import Conversation, Keeper, Store, bytes_of, common, contents_of, continued, digest
from omni_jax.decode.limits import Limits
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.request import requests_for
from omni_jax.inputs.batch import Batch
from omni_jax.omni import Omni, Reply
from omni_jax.weights.drafters import load_drafter
from tests.helpers.slots import assert_same
from tests.parity import audio_part, image_part, user

LOOK = [image_part(90, 90, 5), "What is this, and what do you see in it?"]
MUCH = 1 << 30


@pytest.fixture(autouse=True)
def short_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations of these tests are shorter than those that are worth keeping."""
    monkeypatch.setattr(keeping, "LEAST", 16)


def contents(omni: Omni, messages: list[dict]) -> np.ndarray:
    return contents_of(omni.prepare(messages), omni.config.thinker.vision.spatial_merge_size)


def text(ids: list[int]) -> np.ndarray:
    return contents_of(Batch.of_text([ids]), 2)


def conversation(ids: list[int], size: int = 10) -> Conversation:
    return Conversation(text(ids), jnp.zeros(size, jnp.float32), None)


def test_media_tell_prompts_apart(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    one, same = (contents(omni, user(*LOOK)) for _ in range(2))
    other = contents(omni, user(image_part(90, 90, 6), LOOK[1]))
    longer = contents(omni, user(*LOOK, image_part(60, 60, 7), audio_part(1.2, 5)))
    np.testing.assert_array_equal(one, same)
    media = np.flatnonzero(one[:, 4:].any(axis=1))
    assert len(one) == len(other) and common(one, other) == media[0]
    np.testing.assert_array_equal(one[:, 0], other[:, 0])
    assert len(np.unique(one[media, 4:], axis=0)) == len(media), "each place in a picture by itself"
    assert media[-1] < common(one, longer) < len(one), "whatever else is packed with it"


def test_a_reply_continues_its_prompt(omnis: Callable[[str], Omni]) -> None:
    ids = list(range(3, 9))
    np.testing.assert_array_equal(continued(text(ids[:4]), ids[4:], 0.0), text(ids))
    assert digest(np.zeros((2, 3))) != digest(np.zeros((3, 2))) != digest(np.zeros((3, 2), np.float32))


def test_the_least_recently_used_goes_first() -> None:
    size = bytes_of(conversation([1] * 40))
    store, made = Store(3 * size), []
    for first in range(3):
        store.keep(conversation([first] * 40))
    assert store.find(text([0] * 41), False) is not None, "used"
    store.keep(conversation([3] * 40))
    found = [store.find(text([first] * 41), False) for first in range(4)]
    assert [one is not None for one in found] == [True, False, True, True] and store.bytes == 3 * size
    store.keep(conversation([9] * 40, 3000))
    assert store.find(text([9] * 41), False) is None and store.bytes == 3 * size, "larger than all there is room for"
    arrays = [np.arange(4)]
    for _ in range(2):
        features = Store(100).features(arrays, lambda: made.append(1) or jnp.zeros(3))
    assert made == [1, 1] and features.shape == (3,)


def test_what_a_prompt_goes_on_from() -> None:
    store = Store(MUCH)
    store.keep(conversation(list(range(40))))
    store.keep(conversation(list(range(60))))
    assert store.bytes == bytes_of(conversation(list(range(60)))), "the shorter one is the beginning of the longer"
    for ids, tokens in ((list(range(90)), 59), (list(range(60)), 58), ([*range(30), 1, 1], 29), ([7] * 50, None)):
        found = store.find(text(ids), False)
        assert (None if found is None else found.tokens) == tokens


def test_one_of_very_many_conversations_is_found() -> None:
    store, same = Store(MUCH), list(range(40))
    for number in range(300):
        store.keep(conversation([*same, number, *range(30)]))
    for number in (0, 299):
        found = store.find(text([*same, number, *range(40)]), False)
        assert found is not None and found.tokens == len(same) + 30, "all begin alike, and this one goes on longest"
    found = store.find(text([*same, 999]), False)
    assert found is not None and found.tokens == len(same) - 1
    assert store.find(text([999, *same]), False) is None


def with_media(ids: list[int], first: int, last: int) -> np.ndarray:
    """Contents of which tokens `first` to `last` are of a picture."""
    found = text(ids)
    found[first : last + 1, 4:] = 1
    return found


def test_hidden_states_are_wanted_where_media_are() -> None:
    ids, hidden = list(range(400)), jnp.zeros(1)
    made = {n: with_media(ids[:n], 20, 60) for n in (200, 300, 400)}
    store = Store(MUCH)
    store.keep(Conversation(made[300], jnp.zeros(1), None))
    for wanted, tokens in ((False, 299), (True, 19)):
        found = store.find(made[400], wanted)
        assert found is not None and found.tokens == tokens
    store.keep(Conversation(made[200], jnp.zeros(1), hidden))
    found = store.find(made[400], True)
    assert found is not None and found.tokens == 199, "the shorter one has them"
    store.keep(Conversation(made[400], jnp.zeros(1), hidden))
    (kept,) = {*store._kept}
    assert len(kept.contents) == 400, "it has all that the others have"


def test_nothing_is_left_of_what_is_dropped() -> None:
    store = Store(3 * bytes_of(conversation([1] * 40)))
    for number in range(20):
        store.keep(conversation([number // 2, *range(39)]))
        store.keep(conversation([number] * 10))
    assert len(store._kept) == 3, "and none that is too short to be found"
    store.keep(conversation([99] * 40, 3000))
    for kept in [*store._kept]:
        store._drop(kept)
    assert not store.bytes and not store._by_beginning and not store._by_end


def turns(omni: Omni, first: list[dict], more: list[str], replies: list[Reply], **own: Any) -> Iterator[Prompt | None]:
    """A conversation of several turns: each prompt once the reply to the one before is there."""
    messages = list(first)
    yield replace(Prompt(omni.prepare(messages), 0, 12), **own)
    for count, question in enumerate(more, 1):
        while len(replies) < count:
            yield None
        messages += [{"role": "assistant", "content": replies[-1].text}, {"role": "user", "content": question}]
        yield replace(Prompt(omni.prepare(messages), count, 12), **own)


def answers(omni: Omni, first: list[dict], more: list[str], **settings: Any) -> list[Reply]:
    replies: list[Reply] = []
    for _, reply in omni.generate_many(turns(omni, first, more, replies), slots=2, **settings):
        replies.append(reply)
    return replies


@pytest.mark.parametrize("kind, piece", [(None, None), (None, 16), ("dflash", None), ("eagle3", 16)])
def test_a_further_turn_runs_its_new_tokens(
    kind: str | None,
    piece: int | None,
    omnis: Callable[[str], Omni],
    drafters: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    omni, encoded = omnis("small"), []
    see = encoders.encode_vision
    monkeypatch.setattr(encoders, "encode_vision", lambda *a, **k: encoded.append(1) or see(*a, **k))
    settings: dict[str, Any] = {"stop_ids": (), "temperature": 1.0, "repetition_penalty": 1.2, "piece_tokens": piece}
    if kind is not None:
        settings |= {"drafter": load_drafter(drafters(kind, "small")), "draft_tokens": 3}
    else:
        settings |= {"speech": True, "max_frames": 8}
    more = ["And now?", "Go on."]
    want = answers(omni, user(*LOOK), more, **settings)
    encoded.clear()
    got = answers(omni, user(*LOOK), more, keep_bytes=MUCH, **settings)
    assert encoded == [1], "the picture once"
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs, spoken=kind is None)
    first, second, third = (reply.stats for reply in got)
    assert first["cached_tokens"] == 0 and second["cached_tokens"] >= first["prompt_tokens"] - 8
    assert third["cached_tokens"] >= second["prompt_tokens"] - 8
    assert "cached_tokens" not in want[1].stats


def test_a_short_conversation_is_neither_copied_nor_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "LEAST", 64)
    store, taken = Store(MUCH), []
    for number, ids in enumerate(([1] * 60, [2] * 61)):
        (request,) = requests_for(Batch.of_text([ids]), Limits(5), [0])
        request.token_ids = [3] * 5
        keeper = Keeper(store)
        keeper.begin(request, text(ids), 0.0, False)
        keeper.end(request, lambda tokens: taken.append(tokens) or jnp.zeros(1))
        assert len(taken) == number
    assert taken == [65] and store.find(text([2] * 61 + [3] * 5), False) is not None
