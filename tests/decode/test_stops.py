"""A reply ends before its first stop string, whatever tokens, chunks, rows and drafts it comes in."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.decode.stops import StopStrings, Watch
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from tests.parity import image_part, user

ASKED = [user("Why is the sky blue?"), user(image_part(60, 80, 1), "What is this?"), user("And a third.")]
NEW = 40


class Letters:
    """A tokenizer whose tokens are the pieces that it is given."""

    special = ("<|end|>",)

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

    def token_bytes(self, i: int) -> bytes:
        return self.pieces[i]


def reference(pieces: list[bytes], stops: tuple[str, ...]) -> tuple[int, str, str | None]:
    """How many tokens a reply has, its text, and the stop string that it met, by looking at every prefix."""
    for n in range(1, len(pieces) + 1):
        data = b"".join(pieces[:n])
        found = [(data.find(stop.encode()), i, stop) for i, stop in enumerate(stops) if stop.encode() in data]
        if found:
            at, _, stop = min(found)
            return n, data[:at].decode("utf-8", "replace"), stop
    return len(pieces), b"".join(pieces).decode("utf-8", "replace"), None


def test_any_text_in_any_tokens_and_chunks() -> None:
    draw, met = random.Random(0), 0
    for _ in range(2000):
        data = "".join(draw.choices("ab é語", k=draw.randint(1, 24))).encode()
        cuts = sorted({0, len(data), *draw.choices(range(len(data)), k=draw.randint(0, 12))})
        pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
        pieces.insert(draw.randint(0, len(pieces)), b"")
        stops = tuple("".join(draw.choices("ab é語", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3)))
        tokens, text, stop = reference(pieces, stops)
        watch, kept, shown = Watch(StopStrings(Letters(pieces), stops)), 0, ""  # type: ignore[arg-type]
        for chunk in chunks(list(range(len(pieces))), draw):
            took = watch.add(chunk)
            kept += took
            shown += watch.piece()
            assert text.startswith(shown), "no part of a stop string is shown"
            if watch.met is None:
                held = b"".join(pieces[:kept])[watch.text_end :]
                assert not held or any(s.encode().startswith(held) for s in stops), "nothing is held without reason"
            assert watch.tokens <= kept and sum(map(len, pieces[: watch.tokens])) <= watch.text_end
        assert (kept, watch.met, watch.text()) == (tokens, stop, text) and shown + watch.last_piece() == text
        met += stop is not None
    assert 200 < met < 1900


def chunks(ids: list[int], draw: random.Random) -> Iterator[list[int]]:
    while ids:
        n = draw.randint(1, 5)
        yield ids[:n]
        ids = ids[n:]


@pytest.fixture(scope="module")
def omni(omnis: Callable[[str], Omni]) -> Omni:
    return omnis("tiny")


@pytest.fixture(scope="module")
def free(omni: Omni) -> list[Any]:
    """Replies without a stop string."""
    return [omni.generate(messages, max_new_tokens=NEW, stop_ids=()) for messages in ASKED]


def stops_of(omni: Omni, ids: list[int], at: int) -> str:
    """A text that token number `at` completes and tokens before it begin, and that is not met earlier; else ""."""
    tokenizer = omni.processor.tokenizer
    text, before, last = (tokenizer.decode(some) for some in (ids[: at + 1], ids[:at], ids[at : at + 1]))
    stop = text[text.rfind("\ufffd") + 1 :][-6:]
    return stop if stop not in before and stop not in last else ""


def expected(omni: Omni, ids: list[int], stops: tuple[str, ...]) -> tuple[int, str, str | None]:
    return reference([omni.processor.tokenizer.token_bytes(i) for i in ids], stops)


def test_every_door_ends_alike(omni: Omni, free: list[Any], drafters: Callable[[str, str], Path]) -> None:
    drafter = load_drafter(drafters("dflash", "tiny"))
    # Met late by one row, early by another, and never.
    places = [next(filter(None, (stops_of(omni, r.token_ids, i) for i in at))) for r, at in places_in(free)]
    stops = (*places, "never met")
    want = [expected(omni, reply.token_ids, stops) for reply in free]
    assert len({n for n, _, _ in want}) > 1 and min(n for n, _, _ in want) < NEW
    settings = {"max_new_tokens": NEW, "stop_ids": (), "stop": list(stops)}
    doors = [
        omni.generate(ASKED, **settings),
        [omni.generate(messages, **settings) for messages in ASKED],
        [list(omni.stream(messages, **settings))[-1].reply for messages in ASKED],
        [reply for _, reply in sorted(omni.generate_many(ASKED, slots=2, **settings), key=lambda pair: pair[0])],
        omni.generate(ASKED, drafter=drafter, draft_tokens=3, **settings),
        [r for _, r in sorted(omni.generate_many(ASKED, slots=2, drafter=drafter, draft_tokens=3, **settings))],
    ]
    for replies in doors:
        for reply, (n, text, stop), whole in zip(replies, want, free, strict=True):
            assert (reply.text, reply.token_ids) == (text, whole.token_ids[:n])
            assert reply.stats["stop_string"] == stop and reply.stats["new_tokens"] == n
            assert reply.stats["finish_reason"] == ("length" if stop is None else "stop")
    for reply in doors[4]:
        assert sum(reply.stats["round_tokens"]) == reply.stats["new_tokens"] - 1, "rounds behind the end do not count"


def places_in(free: list[Any]) -> list[tuple[Any, range]]:
    return [(free[0], range(24, 40)), (free[1], range(3, 20))]


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 24])
def test_a_stream_shows_no_part_of_it(at: int, omni: Omni, free: list[Any]) -> None:
    ids = free[0].token_ids
    stop = next(filter(None, (stops_of(omni, ids, i) for i in range(at, NEW))))
    n, text, _ = expected(omni, ids, (stop,))
    events = list(omni.stream(ASKED[0], max_new_tokens=NEW, stop_ids=(), stop=stop))
    shown = ""
    for event in events:
        shown += event.text
        assert text.startswith(shown)
    assert shown == text == events[-1].reply.text
    assert [i for event in events for i in event.token_ids] == ids[:n] == events[-1].reply.token_ids


def test_held_text_is_released(omni: Omni, free: list[Any]) -> None:
    """A reply whose end might have begun a stop string, and does not."""
    decode = omni.processor.tokenizer.decode
    new = next(n for n in range(20, NEW) if "\ufffd" not in decode(free[0].token_ids[:n])[-3:])
    text = decode(free[0].token_ids[:new])
    events = list(omni.stream(ASKED[0], max_new_tokens=new, stop_ids=(), stop=text[-3:] + "and more"))
    assert "".join(event.text for event in events) == text and events[-1].text == text[-3:]
    reply = events[-1].reply
    assert reply is not None and reply.stats["stop_string"] is None and reply.stats["finish_reason"] == "length"


def test_rows_that_have_met_theirs_are_not_run_on(omni: Omni, free: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_jax.decode import batching

    retired = []
    monkeypatch.setattr(batching, "retire", lambda state, b: retired.append(int(b)) or state)
    stop = next(filter(None, (stops_of(omni, free[1].token_ids, i) for i in range(3, 20))))
    omni.generate(ASKED, max_new_tokens=NEW, stop_ids=(), stop=stop)
    assert retired == [1]


def test_speech_says_the_text_before_it(omnis: Callable[[str], Omni]) -> None:
    omni, messages = omnis("small"), user("Say it.")
    settings = {"max_new_tokens": 12, "stop_ids": (), "speech": True, "speech_temperature": 0.0, "max_frames": 6}
    ids = omni.generate(messages, max_new_tokens=12, stop_ids=()).token_ids
    at = next(i for i in range(4, 12) if stops_of(omni, ids, i))
    stop = stops_of(omni, ids, at)
    reply = omni.generate(messages, stop=stop, **settings)
    streamed = list(omni.stream(messages, stop=stop, **settings))[-1].reply
    # What is said without stop strings if the token behind the spoken ones is the last.
    tokenizer = omni.processor.tokenizer
    begun = len(b"".join(map(tokenizer.token_bytes, ids[: at + 1]))) - len(stop.encode())
    said = next(n for n in range(at + 1) if len(b"".join(map(tokenizer.token_bytes, ids[: n + 1]))) > begun)
    want = omni.generate(messages, **{**settings, "max_new_tokens": said + 1})
    assert said < at, "the stop string spans tokens"
    np.testing.assert_array_equal(reply.codes, want.codes)
    np.testing.assert_array_equal(streamed.codes, want.codes)


def test_a_control_token_is_no_text(omni: Omni) -> None:
    end = omni.processor.tokenizer.token_id("<|im_end|>")
    with pytest.raises(InputError, match=rf"stop_ids=\[{end}\]"):
        omni.generate(ASKED[0], stop=["Observation:", "<|im_end|>"])
