"""Log-probabilities are those of the model itself, for every token of a reply, however it was drawn."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.decode.reply import Logprobs
from omni_jax.decode.sampling import Plan, Sampling
from omni_jax.decode.text import reported, reported_shape
from omni_jax.errors import InputError
from omni_jax.omni import Omni, Reply
from omni_jax.weights.drafters import load_drafter
from tests.parity import audio_part, image_part, user

ASKED = [user("Just words."), user(image_part(60, 80, 1), audio_part(1.2, 5), "Both, and more words.")]
NEW, TOP = 12, 5
SETTINGS = {"max_new_tokens": NEW, "stop_ids": (), "temperature": 0.8, "top_k": 40, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def omni(omnis: Callable[[str], Omni]) -> Omni:
    return omnis("tiny")


def teacher_forced(omni: Omni, messages: list[dict], token_ids: list[int]) -> np.ndarray:
    """Log-softmax of the Thinker's logits before each of n reply tokens, float32 [n, V], in one forward."""
    batch, n = omni.prepare(messages), len(token_ids)
    T = batch.token_ids.shape[1]
    more = T + np.arange(n) + batch.rope_delta[0]
    nothing = np.full((1, n), -1, np.int32)
    whole = dataclasses.replace(
        batch,
        token_ids=np.concatenate([batch.token_ids, np.array([token_ids], np.int32)], axis=1),
        mask=np.pad(batch.mask, ((0, 0), (0, n)), constant_values=True),
        position_ids=np.concatenate([batch.position_ids, np.broadcast_to(more, (3, 1, n))], axis=2).astype(np.float32),
        visual_index=np.concatenate([batch.visual_index, nothing], axis=1),
        audio_index=np.concatenate([batch.audio_index, nothing], axis=1),
    )
    return np.asarray(jax.nn.log_softmax(omni.logits(whole)[0, T - 1 : -1], axis=-1))


def check(got: Logprobs, token_ids: list[int], want: np.ndarray, k: int = TOP) -> None:
    n = len(token_ids)
    assert got.token.shape == (n,) and got.top.shape == got.top_ids.shape == (n, k)
    np.testing.assert_allclose(got.token, want[np.arange(n), token_ids], atol=1e-4, rtol=0)
    np.testing.assert_allclose(got.top, -np.sort(-want, axis=1)[:, :k], atol=1e-4, rtol=0)
    np.testing.assert_allclose(got.top, np.take_along_axis(want, got.top_ids, axis=1), atol=1e-4, rtol=0)


def joined(parts: list[Logprobs]) -> Logprobs:
    return Logprobs(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Logprobs)))


@pytest.fixture(scope="module")
def plain(omni: Omni) -> list[Reply]:
    return [omni.generate(messages, seed=3, **SETTINGS) for messages in ASKED]


@pytest.fixture(scope="module")
def truth(omni: Omni, plain: list[Reply]) -> list[np.ndarray]:
    return [teacher_forced(omni, m, reply.token_ids) for m, reply in zip(ASKED, plain, strict=True)]


def test_text_and_media_alone_and_in_a_batch(omni: Omni, plain: list[Reply], truth: list[np.ndarray]) -> None:
    together = omni.generate(ASKED, seed=3, logprobs=TOP, **SETTINGS)
    alone = [omni.generate(messages, seed=3, logprobs=TOP, **SETTINGS) for messages in ASKED]
    for replies in (together, alone):
        for reply, want, without in zip(replies, truth, plain, strict=True):
            assert reply.token_ids == without.token_ids and without.logprobs is None
            check(reply.logprobs, reply.token_ids, want)


def test_streams_and_slots(omni: Omni, plain: list[Reply], truth: list[np.ndarray]) -> None:
    events = list(omni.stream(ASKED[1], seed=3, logprobs=TOP, **SETTINGS))
    check(joined([e.logprobs for e in events if e.logprobs is not None]), plain[1].token_ids, truth[1])
    assert [len(e.logprobs.token) for e in events[:-1]] == [len(e.token_ids) for e in events[:-1]]
    check(events[-1].reply.logprobs, plain[1].token_ids, truth[1])
    for number, reply in omni.generate_many(ASKED, slots=2, seed=3, logprobs=TOP, **SETTINGS):
        check(reply.logprobs, plain[number].token_ids, truth[number])


@pytest.mark.parametrize("kind, more", [("dflash", {"draft_tokens": 3}), ("eagle3", {"draft_tree": (2, 3)})])
def test_drafted(
    kind: str, more: dict[str, Any], omni: Omni, plain: list[Reply], truth: list[np.ndarray],
    drafters: Callable[[str, str], Path],
) -> None:  # fmt: skip
    drafter = load_drafter(drafters(kind, "tiny"))
    replies = omni.generate(ASKED, seed=3, logprobs=TOP, drafter=drafter, **more, **SETTINGS)
    for reply, want, without in zip(replies, truth, plain, strict=True):
        assert reply.token_ids == without.token_ids
        check(reply.logprobs, reply.token_ids, want)


def test_drawn_drafts(omni: Omni, drafters: Callable[[str, str], Path]) -> None:
    more = {"drafter": load_drafter(drafters("dflash", "tiny")), "draft_tokens": 3, "draft_sampling": True}
    reply = omni.generate(ASKED[0], seed=3, logprobs=TOP, **more, **SETTINGS)
    check(reply.logprobs, reply.token_ids, teacher_forced(omni, ASKED[0], reply.token_ids))


def test_the_tokens_alone_and_all_alternatives(omni: Omni, plain: list[Reply], truth: list[np.ndarray]) -> None:
    for k in (0, 20):
        check(omni.generate(ASKED[0], seed=3, logprobs=k, **SETTINGS).logprobs, plain[0].token_ids, truth[0], k)


def test_up_to_a_stop_string(omni: Omni, plain: list[Reply], truth: list[np.ndarray]) -> None:
    tokenizer, ids = omni.processor.tokenizer, plain[0].token_ids
    at = next(
        i for i in range(4, NEW) if tokenizer.decode(ids[i : i + 1]).isascii() and tokenizer.decode(ids[i : i + 1])
    )
    reply = omni.generate(ASKED[0], seed=3, logprobs=TOP, stop=tokenizer.decode(ids[at : at + 1]), **SETTINGS)
    n = len(reply.token_ids)
    assert n <= at + 1
    check(reply.logprobs, reply.token_ids, truth[0][:n])


def test_programs_are_the_same_unless_asked() -> None:
    assert Sampling().plan(50) == Plan(True, False, 0) and reported_shape(Sampling().plan(50)) == ()
    tokens = np.array([3, -1], np.int32)
    assert reported(tokens, None, Sampling().plan(50)) is tokens  # type: ignore[arg-type]
    plans = [Sampling(logprobs=k).plan(50) for k in (1, 5, 20)]
    assert len(set(plans)) == 1, "one program for all numbers of alternatives"
    assert Sampling(logprobs=20).plan(7).top_logprobs == 7


@pytest.mark.parametrize("wrong", [-1, 21, True, 2.5, "5"])
def test_wrong_numbers_are_named(wrong: Any) -> None:
    with pytest.raises(InputError, match="logprobs is .*0 to 20"):
        Sampling(logprobs=wrong)
