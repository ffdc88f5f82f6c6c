"""Requests that are cancelled, and rows that speak beside rows that do not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.decode import batching as running
from omni_jax.decode.answers import replies_in_turn
from omni_jax.decode.batching import Admission, Batching
from omni_jax.decode.chunk import Chunk
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.generation import GenerationPlan
from omni_jax.decode.limits import Limits
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.request import Request, requests_for
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.omni import Omni, Reply
from omni_jax.settings import Voice
from omni_jax.weights.drafters import load_drafter
from tests.helpers.slots import ASKED, TEXTS, in_order
from tests.parity import user


def engine_of(omni: Omni) -> PlainEngine:
    return PlainEngine(omni.params["thinker"], omni.declarations["thinker"], omni.config.thinker.text, Sampling())


def alone(engine: PlainEngine, admission: Admission) -> list[int]:
    """What the one request of an admission says when nobody cancels it or runs beside it."""
    requests = requests_for(admission.batch, admission.requests[0].limits, [0])
    Batching(engine, 1, Admission(admission.batch, requests)).finish()
    return requests[0].token_ids


def test_a_row_whose_request_is_cancelled_goes_to_the_next(
    omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    retired, retire = [], running.retire
    monkeypatch.setattr(running, "retire", lambda state, b: retired.append(int(b)) or retire(state, b))
    omni, engine = omnis("tiny"), engine_of(omnis("tiny"))
    limits, texts = (900, 60, 40, 50), ("One.", "Two and more.", "Three.", "Four.")
    batches = [omni.prepare(user(text)) for text in texts]
    admissions = [
        Admission(batch, requests_for(batch, Limits(new), [0])) for batch, new in zip(batches, limits, strict=True)
    ]
    endless, *others = [admission.requests[0] for admission in admissions]
    batching, left = Batching(engine, 2, waiting=iter(admissions)), []
    for done in batching.run():
        left += done
        if endless.token_ids and not endless.cancelled:
            assert batching.rows[0] is endless
            endless.cancel()
        assert not endless.cancelled or len(endless.token_ids) < 100, "nothing is recorded any more"
    assert left[0] is endless and set(left[1:]) == set(others), "handed out at once, before those that ran beside it"
    want = [alone(engine, admission) for admission in admissions[1:]]
    assert [request.token_ids for request in others] == want
    assert endless.done and endless.complete and not endless.stopped and endless.seconds > 0
    assert retired == [0], "the device is told, once"


def test_a_cancelled_row_changes_nothing_in_those_beside_it(omnis: Callable[[str], Omni]) -> None:
    omni, engine = omnis("tiny"), engine_of(omnis("tiny"))
    batch = omni.prepare([user("One."), user("Two and more.")])
    plain = requests_for(batch, Limits(80), [0, 0])
    Batching(engine, 2, Admission(batch, plain)).finish()
    requests = requests_for(batch, Limits(80), [0, 0])
    for done in Batching(engine, 2, Admission(batch, requests), steps=8).run():
        if len(requests[0].token_ids) == 9:
            requests[0].cancel()
        assert all(request.complete for request in done)
    assert requests[0].token_ids == plain[0].token_ids[:9] and requests[1].token_ids == plain[1].token_ids


def test_a_closed_iterator_takes_no_further_prompt(omnis: Callable[[str], Omni]) -> None:
    taken = []

    def source() -> Iterator[list[dict]]:
        for number in range(9):
            taken.append(number)
            yield user(f"Question {number}")

    replies: Any = omnis("tiny").generate_many(source(), slots=2, max_new_tokens=5, stop_ids=())
    next(replies)
    before = list(taken)
    replies.close()
    assert taken == before and len(taken) <= 5 and list(replies) == []


def test_a_chunk_ends_with_a_text_while_prompts_may_come(
    omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a row is free: the end is told at once, and no row idles until the others have their steps."""
    omni, engine, steps = omnis("tiny"), engine_of(omnis("tiny")), []
    receive = PlainEngine.receive

    def reading(self: PlainEngine, chunk: Chunk, rows: Any) -> None:
        steps.append(int((chunk.read()[..., 0] >= 0).any(axis=0).sum()))
        receive(self, chunk, rows)

    monkeypatch.setattr(PlainEngine, "receive", reading)
    batch = omni.prepare(user("One."))
    admissions = [Admission(batch, requests_for(batch, Limits(new), [0])) for new in (4, 20)]
    ended = []

    def waiting() -> Iterator[Admission | None]:
        yield from admissions
        while len(ended) < 2:
            yield None

    for done in Batching(engine, 3, waiting=waiting(), steps=8).run():
        ended += done
    assert steps == [1, 1, 3, 8, 8], "the prompts' own tokens, then the rest of the short text, then that of the long"


VOICES: tuple[dict[str, Any], ...] = ({}, {"speaker": "vera"}, {"speech": False}, {}, {"speaker": "vera"})


def spoken_alone(omni: Omni, asked: list[tuple], **settings: Any) -> list[Reply]:
    silent = {name: value for name, value in settings.items() if name not in ("speech", "max_frames")}
    return [
        omni.generate(messages, seed=seed, max_new_tokens=new, **(silent if "speech" in own else {**settings, **own}))
        for (messages, seed, new), own in zip(asked, VOICES, strict=True)
    ]


@pytest.mark.parametrize("asked, drafted, stop", [(ASKED, False, None), (TEXTS, True, "e")])
def test_rows_speak_as_alone_beside_rows_that_do_not(
    asked: list[tuple],
    drafted: bool,
    stop: str | None,
    omnis: Callable[[str], Omni],
    drafters: Callable[[str, str], Path],
) -> None:
    omni = omnis("small")
    settings: dict[str, Any] = {"speech": True, "max_frames": 45, "temperature": 1.0, "stop_ids": (), "stop": stop}
    want = spoken_alone(omni, asked, **settings)
    if drafted:
        settings |= {"drafter": load_drafter(drafters("eagle3", "small")), "draft_tokens": 3}
    prompts = [
        replace(Prompt(omni.prepare(messages), seed, new), **own)
        for (messages, seed, new), own in zip(asked, VOICES, strict=True)
    ]
    got = in_order(omni.generate_many(prompts, slots=2, **settings))
    assert [reply.token_ids for reply in got] == [reply.token_ids for reply in want]
    assert [reply.text for reply in got] == [reply.text for reply in want]
    for ours, theirs, own in zip(got, want, VOICES, strict=True):
        if own.get("speech") is False:
            assert ours.audio is None and ours.codes is None and "frames" not in ours.stats
            continue
        assert ours.codes is not None and theirs.codes is not None and ours.audio is not None
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_allclose(ours.audio, theirs.audio, atol=1e-5, rtol=0)
        for name in ("frames", "audio_seconds", "speech_finish_reason", "new_tokens", "finish_reason"):
            assert ours.stats[name] == theirs.stats[name]
    assert len({reply.stats.get("frames") for reply in got}) > 1, "rows that end at different times"


SPEAKING = GenerationPlan(Sampling(), Limits(4), Voice(speech_repetition_penalty=1.0, max_frames=90), None)


def admitted(omni: Omni, prompts: list[Prompt], frames: tuple[int, ...], rows: int) -> list[Admission]:
    """Prompts whose speech has so many frames each."""
    voices = [replace(Voice(speech_repetition_penalty=1.0), max_frames=most) for most in frames]
    return [
        omni._make_generator().alone(replace(SPEAKING, voice=voice), prompt, i, rows)
        for i, (prompt, voice) in enumerate(zip(prompts, voices, strict=True))
    ]


def test_a_reply_that_is_cancelled_while_it_speaks(omnis: Callable[[str], Omni]) -> None:
    """Its text is complete, its speech is not; the next prompt gets its row."""
    omni = omnis("small")

    def run(texts: tuple[str, ...], cancelled_at: int, together: bool = False) -> list[Request]:
        prompts = [Prompt(omni.prepare(user(text)), 0, 4) for text in texts]
        admissions = admitted(omni, prompts, (90,) * len(texts), 1)
        given: dict[str, Any] = {"first": admissions[0]} if together else {"waiting": iter(admissions)}
        first = admissions[0].requests[0]
        for _ in omni._make_generator().batching(SPEAKING, 1, **given).run():
            if first.speaker is not None and first.speaker.made >= cancelled_at:
                first.cancel()
        return [admission.requests[0] for admission in admissions]

    (want,) = run(("Two.",), 999)
    first, second = run(("One.", "Two."), 20)
    assert first.speaker is not None and first.cancelled and 20 <= first.speaker.made < 90
    assert second.speaker is not None and want.speaker is not None and want.speaker.made == 90
    assert second.token_ids == want.token_ids
    np.testing.assert_array_equal(second.speaker.codes, want.speaker.codes)
    for together in (False, True):
        (last,) = run(("One.",), 20, together)
        assert last.speaker is not None and 20 <= last.speaker.made < 90, "also when no other prompt waits"


def test_a_reply_that_is_complete_does_not_wait_for_those_that_still_speak(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    prompts = [Prompt(omni.prepare(user(text)), 0, 4) for text in ("One.", "Two.")]
    shares: list[float] = []
    for _ in range(2):  # Programs are compiled in the first round.
        admissions = admitted(omni, prompts, (8, 200), 2)
        (short, long), ended = (admission.requests[0] for admission in admissions), []
        batching = omni._make_generator().batching(SPEAKING, 2, waiting=iter(admissions))
        for number, reply in replies_in_turn(batching, omni.processor.tokenizer, omni._sounds.of):
            assert short.speaker is not None and long.speaker is not None
            ended.append((number, short.speaker.made, long.speaker.made < 100))
            shares.append(reply.stats["share_seconds"])
        assert ended == [(0, 8, True), (1, 8, False)]
    assert 2 * shares[2] < shares[3], "nor does its share of the time count what they still take"


def test_a_row_that_speaks_holds_up_no_row_that_writes(
    omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a prompt waits, too: its row is the next to be free, but text is written until then."""
    omni, order, tokens = omnis("small"), [], []
    receive, advance = PlainEngine.receive, Speakers.advance

    def reading(self: PlainEngine, chunk: Chunk, rows: Any) -> None:
        if chunk.plan.rounds > 1:
            order.append("text")
            tokens.append(int((chunk.read()[..., 0] >= 0).sum()))
        receive(self, chunk, rows)

    monkeypatch.setattr(PlainEngine, "receive", reading)
    monkeypatch.setattr(Speakers, "advance", lambda *given: order.append("speech") or advance(*given))
    prompts = [Prompt(omni.prepare(user(text)), 0, new) for text, new in (("One.", 4), ("Two.", 40), ("Three.", 2))]
    prompts[1] = replace(prompts[1], speech=False)
    waiting = iter(admitted(omni, prompts, (90, 1, 1), 2))
    for _ in omni._make_generator().batching(SPEAKING, 2, waiting=waiting, steps=8, frames=8).run():
        pass
    assert tokens[0] == 6 and tokens[1:5] == [8] * 4, "both rows, then the one that writes"
    assert order[:10] == ["text", "speech"] * 5


@pytest.mark.parametrize("speech", [False, True])
def test_a_prompt_cancels_its_reply(
    speech: bool, omnis: Callable[[str], Omni], monkeypatch: pytest.MonkeyPatch
) -> None:
    omni, asked, retired, retire = omnis("small"), [], [], running.retire
    monkeypatch.setattr(running, "retire", lambda state, b: retired.append(int(b)) or retire(state, b))
    prompt = Prompt(
        omni.prepare(user("One.")), 0, 4 if speech else 900, cancelled=lambda: asked.append(1) or len(asked) > 1
    )
    prompts = [prompt, replace(prompt, cancelled=lambda: False, max_new_tokens=4)]
    settings: dict[str, Any] = {"speech": speech, "stop_ids": ()}
    settings |= {"speech_repetition_penalty": 1.0, "max_frames": 90} if speech else {}
    cancelled, other = in_order(omni.generate_many(prompts, slots=1, **settings))
    assert cancelled.stats["finish_reason"] == "cancelled" and cancelled.stats["seconds"] > 0
    assert other.stats["finish_reason"] == "length" and len(other.token_ids) == 4
    if speech:
        assert cancelled.codes is not None and other.codes is not None and cancelled.audio is not None
        assert cancelled.token_ids == other.token_ids and 0 < cancelled.codes.shape[1] < other.codes.shape[1] == 90
        np.testing.assert_array_equal(cancelled.codes, other.codes[:, : cancelled.codes.shape[1]])
    else:
        assert 4 < len(cancelled.token_ids) < 200 and cancelled.token_ids[:4] == other.token_ids
        assert retired == [0], "the device is told that its row writes no more"


def test_a_reply_that_is_cancelled_at_once_is_empty(omnis: Callable[[str], Omni]) -> None:
    prompt = Prompt(omnis("small").prepare(user("One.")), 0, 9, cancelled=lambda: True)
    settings: dict[str, Any] = {"speech": True, "logprobs": 2, "stop_ids": ()}
    ((_, reply),) = omnis("small").generate_many([prompt], slots=1, **settings)
    assert reply.stats["finish_reason"] == "cancelled" and reply.audio is not None and not reply.audio.size
    assert reply.logprobs is not None and len(reply.logprobs.token) == len(reply.token_ids) < 9


def test_a_loop_takes_a_batch_or_a_queue(omnis: Callable[[str], Omni]) -> None:
    """Rows of a batch speak once all know what; another prompt in one of them would be in their way."""
    omni, engine = omnis("tiny"), engine_of(omnis("tiny"))
    batch = omni.prepare(user("One."))
    admission = Admission(batch, requests_for(batch, Limits(2), [0]))
    for given in ({}, {"first": admission, "waiting": iter([admission])}):
        with pytest.raises(AssertionError, match="either"):
            Batching(engine, 1, **given)
