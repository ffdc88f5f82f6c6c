"""Drafters that come and go leave neither their weights nor more than a bounded number of programs."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from omni_jax.decode.draft import plan as drafting
from omni_jax.decode.draft.loop import decode_rounds
from omni_jax.decode.draft.plan import KnownDrafters
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from tests.parity import user

ASKED = {"messages": user("Hi"), "max_new_tokens": 5, "stop_ids": ()}


def test_a_drafter_that_is_dropped_is_forgotten(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, directory = omnis("tiny"), drafters("dflash", "tiny")
    said, held, arrays = [], [], []
    for _ in range(3):
        drafter = load_drafter(directory)
        said.append(omni.generate(**ASKED, drafter=drafter, draft_tokens=2).token_ids)
        held.append(weakref.ref(drafter))
        del drafter
        gc.collect()
        arrays.append(sum(array.nbytes for array in jax.live_arrays()))
    assert [ref() for ref in held] == [None] * 3 and len(set(arrays)) == 1
    assert said[0] == said[1] == said[2] == omni.generate(**ASKED).token_ids


def test_drafters_of_one_architecture_share_programs(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, directory = omnis("tiny"), drafters("eagle3", "tiny")
    one, two = load_drafter(directory), load_drafter(directory)
    omni.generate(**ASKED, drafter=one, draft_tokens=2)
    before = decode_rounds._cache_size()
    omni.generate(**ASKED, drafter=two, draft_tokens=2)
    assert decode_rounds._cache_size() == before
    known = KnownDrafters(omni.config)
    first, second, half = (
        known.resolve_draft_plan(d, 2, None, False) for d in (one, two, load_drafter(directory, "bfloat16"))
    )
    assert first is not None and second is not None and half is not None
    assert first.proposer is second.proposer and first.times is second.times
    assert first.params is one.params and second.params is two.params, "each with its own weights"
    assert half.times is not first.times, "another type takes other times"
    tree = known.resolve_draft_plan(one, 3, (2, 2), False)
    assert tree is not None and tree.proposer is not first.proposer


def test_programs_of_few_architectures_are_kept(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "MAX_ARCHITECTURES", 1)
    omni = omnis("tiny")
    monkeypatch.setattr(omni, "_drafters", KnownDrafters(omni.config))
    decode_rounds.clear_cache()
    made = [load_drafter(drafters(kind, "tiny")) for kind in ("dflash", "eagle3")]
    want = omni.generate(**ASKED).token_ids
    for drafter in (*made, made[0]):
        assert omni.generate(**ASKED, drafter=drafter, draft_tokens=2).token_ids == want
        assert decode_rounds._cache_size() == 1 and len(omni._drafters._shared) == 1


def test_the_least_recently_used_goes_first(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "MAX_ARCHITECTURES", 2)
    known, drafter = KnownDrafters(omnis("tiny").config), load_drafter(drafters("eagle3", "tiny"))
    kept = known.resolve_draft_plan(drafter, None, (2, 2), False)
    for tree in ((2, 3), (2, 2), (3, 2)):
        known.resolve_draft_plan(drafter, None, tree, False)
    again = known.resolve_draft_plan(drafter, None, (2, 2), False)
    assert kept is not None and again is not None and replace(again) == kept and again.proposer is kept.proposer
