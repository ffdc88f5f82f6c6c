"""Requests with settings of their own, side by side: each gets what it gets alone, from few programs."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.decode import text
from omni_jax.decode.drawing import Drawings, shared_plan
from omni_jax.decode.limits import Limits
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.request import Request
from omni_jax.decode.sampling import Plan, Sampling, filtered, sample, values_by_row
from omni_jax.errors import InputError
from omni_jax.omni import Omni, Reply
from omni_jax.settings import Voice
from omni_jax.weights.drafters import load_drafter
from tests.helpers.slots import in_order
from tests.parity import audio_part, user

DRAFTS = {"dflash": "dflash", "tree": "eagle3", "drawn": "dflash"}
# What each of the requests has of its own, by the names of `generate`.
OWN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.1, "top_p": 0.9},
    {"repetition_penalty": 1.4},
    {"temperature": 0.9, "logprobs": 3, "min_p": 0.02, "top_k": 30},
    {"stop_ids": ()},
    {"temperature": 1.0, "repetition_penalty": 1.2, "logprobs": 0, "stop": "e"},
    {"temperature": 1.0},
    {"stop_ids": tuple(range(40, 60)), "temperature": 1.0},
]
NEW = (30, 22, 26, 30, 18, 24, 40, 25, 60)
# Of the call: a stop id that greedy replies meet, and no draws.
CALL: dict[str, Any] = {"stop_ids": (7,)}


def prompt_of(omni: Omni, number: int, own: dict[str, Any], new: int, **more: Any) -> Prompt:
    """A prompt with settings of its own, given as `generate` takes them."""
    ending = {name: own[name] for name in ("stop", "stop_ids") if name in own}
    drawing = {name: value for name, value in own.items() if name not in ending}
    sampling = Sampling(**drawing) if drawing else None
    batch = omni.prepare(user(f"Question number {number}."))
    return Prompt(batch, number, new, sampling=sampling, **ending, **more)


def alone(omni: Omni, number: int, own: dict[str, Any], new: int, **call: Any) -> Reply:
    messages = user(f"Question number {number}.")
    return omni.generate(messages, seed=number, max_new_tokens=new, **{**call, **own})


# Those that are also drafted for.
DRAFTED = (0, 1, 4, 6, 7)


@pytest.mark.parametrize("drafts", [None, *(pytest.param(how, marks=pytest.mark.slow) for how in DRAFTS)])
def test_each_gets_what_it_gets_alone(
    drafts: str | None, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, numbers = omnis("tiny"), tuple(range(len(OWN)))
    drafting: dict[str, Any] = {}
    if drafts is not None:
        numbers = DRAFTED
        drafting["drafter"] = load_drafter(drafters(DRAFTS[drafts], "tiny"))
        drafting |= {"draft_tree": (2, 3), "draft_tokens": 6} if drafts == "tree" else {"draft_tokens": 3}
        drafting["draft_sampling"] = drafts == "drawn"
    # Drawn drafts decide the reply; others only how soon it comes.
    want = [alone(omni, i, OWN[i], NEW[i], **CALL, **(drafting if drafts == "drawn" else {})) for i in numbers]
    asked = [prompt_of(omni, i, OWN[i], NEW[i]) for i in numbers]
    got = in_order(omni.generate_many(asked, slots=4, **CALL, **drafting))
    assert [reply.token_ids for reply in got] == [reply.token_ids for reply in want]
    assert [reply.text for reply in got] == [reply.text for reply in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.stats["finish_reason"] == theirs.stats["finish_reason"]
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        if ours.logprobs is not None and theirs.logprobs is not None:
            np.testing.assert_array_equal(ours.logprobs.top_ids, theirs.logprobs.top_ids)
            np.testing.assert_allclose(ours.logprobs.token, theirs.logprobs.token, atol=1e-4)
            np.testing.assert_allclose(ours.logprobs.top, theirs.logprobs.top, atol=1e-4)
    reasons = {reply.stats["finish_reason"] for reply in want}
    assert reasons == {"stop", "length"} and len({len(reply.token_ids) for reply in want}) > 4


def programs() -> list[int]:
    """How many there are that run prompts, and that run chunks."""
    compiled: list[Any] = [text.prefill, text.decode_chunk]
    return [program._cache_size() for program in compiled]


def test_programs_stay_few_whatever_is_asked_for(omnis: Callable[[str], Omni]) -> None:
    omni, rng = omnis("tiny"), random.Random(3)
    list(omni.generate_many([user("One."), user("Two.")], slots=4, max_new_tokens=9, **CALL))
    before = programs()
    choices: dict[str, tuple] = {
        "temperature": (0.0, 0.3, 0.7, 1.0, 1.3),
        "top_k": (0, 1, 2, 5, 17, 40, 60, 90),
        "top_p": (1.0, 1.0, 0.95, 0.5),
        "min_p": (0.0, 0.0, 0.1),
        "repetition_penalty": (1.0, 1.0, 1.1, 1.5),
        "logprobs": (None, None, 0, 2, 20),
        "stop_ids": ((), (7,), (1, 2, 3), tuple(range(20))),
    }
    asked = [
        prompt_of(omni, i, {name: rng.choice(some) for name, some in choices.items()}, rng.randint(1, 40))
        for i in range(30)
    ]
    replies = in_order(omni.generate_many(asked, slots=4, **CALL))
    assert len(replies) == 30
    prompts, chunks = (now - then for now, then in zip(programs(), before, strict=True))
    # Prompts: greedy or anyhow, with stop ids of two sizes. Chunks: those too, and kinds of candidates.
    assert prompts <= 4 and chunks <= 16


def test_the_call_alone_runs_its_own_program(omnis: Callable[[str], Omni]) -> None:
    drawings = Drawings(Sampling(), (7, 3), 500)
    plain, other = Request(5, Limits(9, (3, 7))), Request(5, Limits(9, (3, 7)), sampling=Sampling(1.0, top_k=9))
    for rows in ((), (plain,), (None, plain, None)):
        drawing = drawings.of_chunk(rows)
        assert drawing.plan == Plan(True, False, 0) and drawing.stop_ids is drawings.own.stop_ids
        assert drawing.values is drawings.own.values
    mixed = drawings.of_chunk((plain, other, None))
    assert mixed.plan == Plan(False, False, 64) and mixed.stop_ids is drawings.own.stop_ids
    assert mixed.values["top_k"].tolist() == [[1], [9], [1]]
    endless = Request(5, Limits(9, ()))
    assert drawings.of_chunk((plain, endless)).stop_ids.tolist() == [[3, 7] + 6 * [-1], 8 * [-1]]
    assert drawings.of_prompts([endless]).plan == Plan(True, False, 0), "nothing of sampling"
    assert drawings.of_prompts([other]).plan == Plan(False, True, 500, 20)


def test_shared_plans_are_few() -> None:
    V, greedy = 5000, Sampling()
    assert shared_plan([greedy, Sampling(repetition_penalty=1.2)], V) == Plan(True, True, 0)
    assert shared_plan([greedy, Sampling(1.0)], V) == Plan(False, False, 0, some_greedy=True)
    assert shared_plan([Sampling(1.0, top_k=3), Sampling(1.0, top_k=50, logprobs=1)], V) == Plan(False, False, 64, 20)
    assert shared_plan([greedy, Sampling(1.0, top_k=65)], V) == Plan(False, False, 1024)
    assert shared_plan([Sampling(1.0), Sampling(1.0, top_k=3)], V) == Plan(False, False, V)
    assert shared_plan([Sampling(1.0, top_k=300)], 200) == Plan(False, False, 200)


def test_a_greedy_row_beside_rows_that_draw() -> None:
    B, V = 3, 40
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(B, V)), jnp.float32).at[0, :9].set(7.0)
    keys, at = jax.random.split(jax.random.key(1), B), jnp.arange(B)
    samplings = [Sampling(), Sampling(1.3), Sampling(1.0)]
    values, plan = values_by_row(samplings), shared_plan(samplings, V)
    tokens = sample(logits, keys, at, None, values, plan)
    assert tokens[0] == 0 == jnp.argmax(logits[0]), "the first of equals"
    for b in (1, 2):
        own = samplings[b]
        row = slice(b, b + 1)
        assert tokens[b] == sample(logits[row], keys[row], at[row], None, own.values(), own.plan(V))[0]
    left = np.isfinite(filtered(logits, None, values, plan)).sum(axis=1)
    assert left.tolist() == [1, V, V]


def test_voices_of_their_own(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    own: list[dict[str, Any]] = [
        {},
        {"speech_temperature": 0.0, "max_frames": 20},
        {"speech_top_k": 9, "speech_repetition_penalty": 1.0, "speaker": "vera", "max_frames": 40},
        {"speech_top_p": 0.8, "max_frames": 30},
        {},
    ]
    call: dict[str, Any] = {"speech": True, "max_frames": 35, "stop_ids": (), "speech_repetition_penalty": 1.0}
    texts = [user("One."), user("Two."), user(audio_part(1.1, 2)), user("Four."), user("Five.")]
    want = [omni.generate(m, seed=i, max_new_tokens=9, **{**call, **own[i]}) for i, m in enumerate(texts)]
    voices = [None if not one else Voice(**{"speech_repetition_penalty": 1.0, **one}) for one in own]
    asked = [Prompt(omni.prepare(m), i, 9, voice=voices[i]) for i, m in enumerate(texts)]
    got = in_order(omni.generate_many(asked, slots=2, **call))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.codes is not None and theirs.codes is not None
        np.testing.assert_array_equal(ours.codes, theirs.codes)
    assert len({reply.stats["frames"] for reply in got}) > 2


@pytest.mark.parametrize(
    "own, complaint",
    [
        ({"stop": [""]}, "empty text"),
        ({"stop_ids": (10**6,)}, "outside the vocabulary"),
        ({"voice": Voice("nobody")}, "nobody"),
    ],
)
def test_bad_settings_of_a_prompt_are_named(own: dict[str, Any], complaint: str, omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    with pytest.raises(InputError, match=complaint):
        list(omni.generate_many([Prompt(omni.prepare(user("Hi")), 0, 3, **own)], speech=True))
