"""Continuous batching: what a slot says is what its prompt gets alone, whoever sits beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omni_jax.decode import batching as running
from omni_jax.decode.chunk import Chunk
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.request import Request
from omni_jax.decode.rows import idle, insert
from omni_jax.decode.text import decode_chunk, prefill
from omni_jax.errors import InputError
from omni_jax.omni import Omni, Reply
from omni_jax.weights.drafters import load_drafter
from tests.helpers.slots import ASKED, TEXTS, in_order
from tests.parity import user


def prompts(omni: Omni, asked: list[tuple] = ASKED) -> list[Prompt]:
    return [Prompt(omni.prepare(messages), seed, new) for messages, seed, new in asked]


def alone(omni: Omni, asked: list[tuple] = ASKED, **settings: Any) -> list[Reply]:
    return [omni.generate(m, seed=seed, max_new_tokens=new, **settings) for m, seed, new in asked]


def ids(replies: list[Reply]) -> list[list[int]]:
    return [reply.token_ids for reply in replies]


def test_a_slot_says_what_its_prompt_gets_alone(omnis: Callable[[str], Omni]) -> None:
    omni, settings = omnis("small"), {"temperature": 1.0, "top_k": 30, "repetition_penalty": 1.3}
    free = alone(omni, stop_ids=(), **settings)
    stop = (free[1].token_ids[11], free[4].token_ids[20])
    for stop_ids, slots in (((), 2), (stop, 3)):
        want = alone(omni, stop_ids=stop_ids, **settings) if stop_ids else free
        got = in_order(omni.generate_many(prompts(omni), slots=slots, stop_ids=stop_ids, **settings))
        assert ids(got) == ids(want)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.text == theirs.text and ours.stats["seconds"] > 0
            for name in ("prompt_tokens", "new_tokens", "finish_reason"):
                assert ours.stats[name] == theirs.stats[name]
    assert len({len(reply.token_ids) for reply in want}) > 3, "rows that end at different times"


@pytest.mark.parametrize("kind, drafts", [("dflash", 3), ("eagle3", "tree"), ("dflash", "auto")])
def test_drafted_slots_say_the_same(
    kind: str, drafts: Any, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drafter = omnis("small"), load_drafter(drafters(kind, "small"))
    drafting = {"draft_tree": (2, 3), "draft_tokens": 6} if drafts == "tree" else {"draft_tokens": drafts}
    settings = {"temperature": 0.9, "stop_ids": ()}
    asked = ASKED[:4] if drafts == 3 else TEXTS
    want = alone(omni, asked, **settings)
    got = in_order(omni.generate_many(prompts(omni, asked), slots=3, drafter=drafter, **drafting, **settings))
    assert ids(got) == ids(want)
    assert all(1 <= reply.stats["tokens_per_round"] <= 17 for reply in got if len(reply.token_ids) > 1)
    if drafts == 3:
        drafted = alone(omni, asked, drafter=drafter, **drafting, **settings)
        assert [r.stats["rounds"] for r in got] == [r.stats["rounds"] for r in drafted], "the same rounds, too"


@pytest.mark.parametrize("kind", ["dflash", "eagle3", "drawn"])
def test_rows_that_draft_beside_rows_that_do_not(
    kind: str, omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]
) -> None:
    omni, drawn = omnis("small"), kind == "drawn"
    drafter = load_drafter(drafters("dflash" if drawn else kind, "small"))
    how = {"draft_tree": (2, 3), "draft_tokens": 6} if kind == "eagle3" else {"draft_tokens": 3}
    drafting = {"drafter": drafter, "draft_sampling": drawn, **how}
    settings = {"temperature": 0.9, "stop_ids": ()}
    want = [
        omni.generate(messages, seed=seed, max_new_tokens=new, **(drafting if i % 2 else {}), **settings)
        for i, (messages, seed, new) in enumerate(TEXTS)
    ]
    asked = [replace(prompt, draft=bool(i % 2)) for i, prompt in enumerate(prompts(omni, TEXTS))]
    got = in_order(omni.generate_many(asked, slots=3, **drafting, **settings))
    assert ids(got) == ids(want)
    assert ["round_tokens" in reply.stats for reply in got] == [bool(i % 2) for i in range(len(got))]


def test_a_cache_that_grows_and_a_prompt_longer_than_it(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    asked = [(user("Hi."), 300), (user("word " * 150), 8), (user("Short."), 5), (user("Next."), 270)]
    want = [omni.generate(messages, max_new_tokens=new, stop_ids=()).token_ids for messages, new in asked]
    made = (Prompt(omni.prepare(messages), 0, new) for messages, new in asked)
    assert ids(in_order(omni.generate_many(made, slots=2, stop_ids=()))) == want


def test_nothing_compiles_for_another_mixture(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    programs = (prefill, decode_chunk, insert, idle)
    texts = ["one two three", "one", "two three four five", "six", "seven eight", "nine"]
    list(omni.generate_many((user(text) for text in texts), slots=3, max_new_tokens=20, stop_ids=()))
    before = [program._cache_size() for program in programs]
    mixed = [
        Prompt(omni.prepare(user(text)), 7, new) for text, new in zip(texts[::-1], (3, 30, 9, 25, 1, 12), strict=True)
    ]
    list(omni.generate_many(mixed, slots=3, stop_ids=()))
    assert [program._cache_size() for program in programs] == before


def test_prompts_are_taken_as_slots_come_free(omnis: Callable[[str], Omni]) -> None:
    omni, taken = omnis("small"), []

    def source() -> Iterator[Prompt]:
        for i, prompt in enumerate(prompts(omni)):
            taken.append(i)
            yield prompt

    ended = []
    for number, _ in omni.generate_many(source(), slots=2, stop_ids=()):
        ended.append(number)
        # Two in the slots, and one ahead; replies are handed out when the slots are full again.
        assert len(taken) <= min(len(ASKED), len(ended) + 2 + 1)
    assert sorted(ended) == list(range(len(ASKED))) != ended and taken == sorted(taken)


def test_a_slot_is_refilled_when_its_row_is_done(omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the end of a chunk: a chunk that others wait for ends with its first row."""
    omni, chunks = omnis("small"), []
    receive = PlainEngine.receive

    def counting(self: PlainEngine, chunk: Chunk, rows: Sequence[Request | None]) -> None:
        if chunk.plan.rounds > 1:
            chunks.append(int((chunk.read()[..., 0] >= 0).any(axis=(0, 2)).sum()))
        receive(self, chunk, rows)

    monkeypatch.setattr(PlainEngine, "receive", counting)
    batch = omni.prepare(user("Hi"))
    asked = (Prompt(batch, 0, new) for new in (5, 30, 7, 4))
    assert sum(1 for _ in omni.generate_many(asked, slots=2, stop_ids=())) == 4
    assert chunks[:3] == [4, 6, 3], "the first token is the prefill's"
    chunks.clear()
    ended = [Prompt(batch, 0, 90, ends=lambda ids: len(ids) > 5), Prompt(batch, 0, 40)]
    assert sum(1 for _ in omni.generate_many(ended, slots=2, stop_ids=())) == 2
    assert chunks == [32, 7], "a row that its prompt has ended is not run on"


def test_prompts_that_follow_from_replies(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    first, later = [user("One."), user("Two.")], []

    def source() -> Iterator[list[dict] | None]:
        yield from first
        given = 0
        while given < len(first):
            if later:
                given += 1
                yield later.pop(0)
            else:
                yield None

    said = {}
    for number, reply in omni.generate_many(source(), slots=2, max_new_tokens=6, stop_ids=()):
        said[number] = reply.token_ids
        if number < 2:
            answer = {"role": "assistant", "content": reply.text}
            later.append([*first[number], answer, {"role": "user", "content": "Go on."}])
    assert sorted(said) == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="None while no reply was awaited"):
        list(omni.generate_many([None]))


def test_a_reply_that_its_prompt_ends(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    want = alone(omni, [(messages, seed, 90) for messages, seed, _ in TEXTS], stop_ids=())
    made = prompts(omni, [(messages, seed, 90) for messages, seed, _ in TEXTS])
    made[1] = replace(made[1], ends=lambda ids: len(ids) > 5)
    got = in_order(omni.generate_many(made, slots=2, stop_ids=()))
    ended = got.pop(1)
    assert 5 < len(ended.token_ids) < 40 and ended.stats["finish_reason"] == "stop"
    assert ended.token_ids == want.pop(1).token_ids[: len(ended.token_ids)]
    assert ids(got) == ids(want) and {reply.stats["finish_reason"] for reply in got} == {"length"}


def test_a_prompt_is_asked_about_all_of_its_reply(omnis: Callable[[str], Omni]) -> None:
    omni, seen = omnis("small"), []
    batch = omni.prepare(user("Hi"))
    asked = Prompt(batch, 0, 90, ends=lambda written: seen.append(list(written)) or False)
    ((_, reply),) = omni.generate_many([asked], slots=1, stop_ids=())
    assert len(seen) == 2 and all(reply.token_ids[: len(written)] == written for written in seen)
    assert len(seen[0]) == 33 and len(seen[1]) == 65, "after each chunk, from the first token on"


def test_a_slot_whose_reply_has_met_a_stop_string_is_not_run_on(
    omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    omni, retired = omnis("small"), []
    retire = running.retire
    monkeypatch.setattr(running, "retire", lambda state, b: retired.append(int(b)) or retire(state, b))
    asked = [(messages, seed, 60) for messages, seed, _ in TEXTS]
    want = alone(omni, asked, stop_ids=(), stop="e")
    got = in_order(omni.generate_many(prompts(omni, asked), slots=2, stop_ids=(), stop="e"))
    assert ids(got) == ids(want) and [reply.text for reply in got] == [reply.text for reply in want]
    stopped = sum(reply.stats["stop_string"] == "e" for reply in want)
    assert len(retired) == stopped - 1 > 0, "beside the last one nothing is decoded any more"


def test_a_bad_conversation_costs_no_reply_that_is_under_way(omnis: Callable[[str], Omni]) -> None:
    omni, taken = omnis("small"), []
    bad = user({"type": "image", "image": "/nowhere.png"})

    def source() -> Iterator[list[dict]]:
        for messages in (user("a"), user("b"), bad, user("c")):
            taken.append(messages)
            yield messages

    answers = omni.generate_many(source(), slots=2, max_new_tokens=4, stop_ids=())
    assert sorted(next(answers)[0] for _ in range(2)) == [0, 1]
    with pytest.raises(InputError, match=r"nowhere\.png"):
        next(answers)
    assert len(taken) == 3, "no further one is taken"


def test_prompts_that_cannot_be_used(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    with pytest.raises(InputError, match="slots is 0"):
        omni.generate_many([], slots=0)
    with pytest.raises(InputError, match="temperature"):
        omni.generate_many([], temperature=-1)
    assert list(omni.generate_many([])) == []
    with pytest.raises(InputError, match="2 conversations"):
        Prompt(omni.prepare([user("a"), user("b")]), 0, 5)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        omni.generate_many([user("Hi")], max_new_tokens=0)
