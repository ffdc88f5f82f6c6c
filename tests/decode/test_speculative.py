"""Drafting changes how many forwards a reply takes, and nothing that it says."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.chunk import ChunkPlan
from omni_jax.decode.draft.engine import SpeculativeEngine, rounds_of
from omni_jax.decode.draft.loop import decode_rounds
from omni_jax.decode.draft.plan import KnownDrafters
from omni_jax.decode.request import Request
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.text import CHUNK
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from scripts.small.oracle import oracle
from tests.helpers.decoding import MIXED, NEW, Asked, ids
from tests.parity import user


@pytest.mark.parametrize(
    "width, sampling", [(4, Sampling()), (8, Sampling(1.0, top_k=20, repetition_penalty=1.3)), (16, Sampling())]
)
def test_an_oracle_changes_the_rounds_and_nothing_else(
    width: int, sampling: Sampling, omnis: Callable[[str], Omni]
) -> None:
    asked = Asked(omnis("small"), omnis("small").prepare(MIXED), sampling)
    plain = asked.plainly()
    for lies in (0.0, 0.4, 1.0):
        drafted = asked.drafted(oracle(plain, width, lies))
        assert ids(drafted) == ids(plain)
        emitted = [rounds_of(request).given for request in drafted]
        assert all(row.sum() == NEW - 1 for row in emitted), "all but the token that the prompt itself gave"
        if lies == 0.0:
            whole = [width] * ((NEW - 1) // width) + [(NEW - 1) % width] * bool((NEW - 1) % width)
            assert all(row.tolist() == whole for row in emitted)
        if lies == 1.0:
            assert set(np.concatenate(emitted).tolist()) == {1}


def test_a_row_that_does_not_draft_takes_no_draft(
    omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(omnis("small"), omnis("small").prepare(MIXED), Sampling())
    plain, requests = asked.plainly(), asked.requests()
    requests[1].drafts = False
    record, most = Request.record, {}

    def spy(self: Request, reports: np.ndarray, plan: ChunkPlan) -> np.ndarray:
        given = record(self, reports, plan)
        most[self] = max([most.get(self, 0), *given.tolist()])
        return given

    monkeypatch.setattr(Request, "record", spy)
    engine = SpeculativeEngine(asked.engine(), oracle(plain, 4, 0.0))
    Batching(engine, len(requests), Admission(asked.batch, requests)).finish()
    assert ids(requests) == ids(plain)
    assert [most[request] for request in requests] == [1 if i == 1 else 4 for i in range(len(requests))]


def test_stop_ids_and_single_rows(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    asked = Asked(omni, omni.prepare(MIXED), Sampling())
    free = asked.plainly()
    stop = (free[0].token_ids[9], free[2].token_ids[14])
    stopped = replace(asked, stop_ids=stop).plainly()
    drafting = oracle(free, 8, 0.2)
    assert ids(replace(asked, stop_ids=stop).drafted(drafting)) == ids(stopped)
    assert len({len(row) for row in ids(stopped)}) > 1
    for b, messages in enumerate(MIXED):
        alone = Asked(omni, omni.prepare(messages), Sampling(), seed=[3 + b])
        one = {**drafting.params, **{name: drafting.params[name][b : b + 1] for name in ("ids", "lie", "length")}}
        assert ids(alone.drafted(replace(drafting, params=one))) == [free[b].token_ids]


def test_a_reply_that_outgrows_its_cache(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    asked = Asked(omni, omni.prepare(user("word " * 60)), Sampling(), new=NEW)
    words = asked.plainly()
    long = replace(asked, new=300)
    said = long.plainly()
    assert said[0].token_ids[:NEW] == words[0].token_ids and long.batch.token_ids.shape[1] + 300 > 256
    assert ids(long.drafted(oracle(words, 8, 0.1))) == ids(said), "behind what the oracle knows it guesses wrong"


def test_no_transfer_and_no_compilation_between_rounds(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    asked = Asked(omni, omni.prepare(MIXED), Sampling())
    drafting = oracle(asked.plainly(), 4, 0.5)
    asked.drafted(drafting)
    compiled = decode_rounds._cache_size()
    engine = SpeculativeEngine(asked.engine(), drafting)
    state = engine.prefill(asked.batch, asked.requests()).state
    for steps in (CHUNK, CHUNK, 8):
        _, state = engine.dispatch(state, engine.plan(state, steps))
    assert decode_rounds._cache_size() == compiled
    # A chunk is one program, and nothing in it speaks to the host. (The transfer guard sees nothing on CPU.)
    static = {"proposer": drafting.proposer, "declaration": engine.target.declaration}
    drawing = engine.target.drawings.own
    static |= {"plan": drawing.plan, "verify_tokens": 4}
    asked_for = (engine.params, state, np.int32(8), drawing.stop_ids, drawing.values)
    program = decode_rounds.lower(*asked_for, **static).compile().as_text()
    assert "while(" in program and not re.findall(r"callback|infeed|outfeed|= \S+ (?:send|recv)\(", program)


@pytest.mark.parametrize("kind, variant", [("dflash", "odd"), ("eagle3", "small")])
def test_drafters_say_what_the_model_says(
    kind: str, variant: str, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drafter = omnis(variant), load_drafter(drafters(kind, variant))
    settings = {"max_new_tokens": 20, "stop_ids": ()}
    for drawn in ({}, {"temperature": 1.0, "top_k": 30, "seed": [7, 8, 9]}):
        want = omni.generate(MIXED, **settings, **drawn)
        got = omni.generate(MIXED, drafter=drafter, draft_tokens=3, **settings, **drawn)
        assert [reply.token_ids for reply in got] == [reply.token_ids for reply in want]
        assert all(1 <= reply.stats["tokens_per_round"] <= 4 for reply in got)


def test_drafted_replies_stream_and_speak_alike(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni = omnis("small")
    dflash, eagle3 = (load_drafter(drafters(kind, "small")) for kind in ("dflash", "eagle3"))
    settings = {"max_new_tokens": 12, "stop_ids": (), "speech": True, "speech_temperature": 0.0, "max_frames": 8}
    plain = [omni.generate(messages, **settings) for messages in MIXED[:2]]
    streamed = list(omni.stream(MIXED[1], drafter=dflash, **settings))[-1].reply
    together = omni.generate(MIXED[:2], drafter=eagle3, draft_tokens=5, draft_tree=(2, 3), **settings)
    for reply, want in ((streamed, plain[1]), *zip(together, plain, strict=True)):
        assert reply is not None and reply.token_ids == want.token_ids
        np.testing.assert_array_equal(reply.codes, want.codes)


def test_a_chosen_width_changes_nothing_else(omnis: Callable[[str], Omni]) -> None:
    asked = Asked(omnis("small"), omnis("small").prepare(MIXED), Sampling())
    plain = asked.plainly()
    engine = SpeculativeEngine(asked.engine(), replace(oracle(plain, 4, 0.3), verify_tokens=(1, 2, 4)))
    assert ids(asked.run(engine)) == ids(plain) and engine.tuner is not None
    assert set(engine.tuner.seconds) == {1, 2, 4} and min(engine.tuner.seconds.values()) > 0


def test_wrong_drafters_and_lengths_are_refused(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    drafter = load_drafter(drafters("dflash", "small"))
    with pytest.raises(InputError, match="width"):
        omnis("odd").generate(user("Hi"), drafter=drafter)
    for tokens in (0, 99, 2.5):
        with pytest.raises(InputError, match=f"draft_tokens is {tokens}"):
            omnis("small").generate(user("Hi"), drafter=drafter, draft_tokens=tokens)  # type: ignore[arg-type]
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"draft_tokens": 3}, "need a drafter"),
        ({"draft_tree": (7, 10)}, "need a drafter"),
        ({"drafter": "dflash/"}, "load one with load_drafter"),
        ({"drafter": drafter, "draft_sampling": "yes"}, "True or False"),
        ({"drafter": drafter, "draft_sampling": True, "draft_tokens": "auto"}, "fixed number"),
    )
    for settings, complaint in wrong:
        with pytest.raises(InputError, match=complaint):
            omnis("small").generate(user("Hi"), **settings)


def test_auto_tries_the_drafters_own_length_too(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    drafter = load_drafter(drafters("dflash", "small"))
    drafting = KnownDrafters(omnis("small").config).resolve_draft_plan(drafter, "auto", None, drawn=False)
    assert drafting is not None and drafting.verify_tokens == (1, 2, 4, 6)
