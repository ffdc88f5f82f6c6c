"""The engine of the server: replies are those of `generate`, whatever happens to others."""

import asyncio

import numpy as np
import pytest

from omni_jax.decode import engine, memory
from omni_jax.decode.answers import STREAM_STEPS, Follower
from omni_jax.decode.engine import PlainEngine
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Event, Reply
from omni_jax.decode.text import CHUNK
from omni_jax.errors import InputError, MemoryLimitError
from omni_jax.serve.answered import Usage
from omni_jax.serve.engine import STEP_SECONDS, Pace, Service
from omni_jax.serve.errors import RequestError
from omni_jax.serve.running import Running
from omni_jax.serve.tickets import Ticket
from omni_jax.settings import Drafting, Voice
from omni_jax.weights.drafters import load_drafter
from tests.parity import audio_part, image_part, user

WORDS = ["The garden", "What do you hear?", "A", "Where is the small house by the river", "Music"]
TOKENS = 24
MEDIA = {
    "picture": user(image_part(56, 84), "What is this?"),
    "other picture": user(image_part(56, 84, seed=1), "What is this?"),
    "sound": user(audio_part(1.3), "And this?"),
}
SPOKEN = ["A", WORDS[3], "picture", "sound"]
# All that is asked at once: words or the name of media, and whether the reply is spoken.
MIXED = [(name, False) for name in [*WORDS, *MEDIA]] + [(name, True) for name in SPOKEN]


def _messages(text):
    return MEDIA.get(text) or [{"role": "user", "content": text}]


def _seed(text):
    names = [*WORDS, *MEDIA]
    return names.index(text) if text in names else 0


@pytest.fixture(scope="module")
def omni(omnis):
    return omnis("tiny")


@pytest.fixture(scope="module")
def expected(omni):
    """The replies to MIXED, each alone."""
    found = {}
    for text, speech in MIXED:
        more = {"max_frames": 12, "speech": True} if speech else {"speech": False}
        found[text, speech] = omni.generate(_messages(text), seed=_seed(text), max_new_tokens=TOKENS, **more)
    return found


def _prompt(omni, text, speech=False, **more):
    voice = Voice(max_frames=12) if speech else None
    stated = {"seed": _seed(text), "max_new_tokens": TOKENS, "speech": speech, "voice": voice, **more}
    return Prompt(omni.prepare(_messages(text)), **stated)


async def _reply(service, prompt):
    """The whole reply, after a check that the events make it up."""
    events = [event async for event in service.answer(prompt)]
    reply = events[-1].reply
    assert reply is not None and "".join(event.text for event in events) == reply.text
    assert [i for event in events for i in event.token_ids] == reply.token_ids
    if reply.audio is not None:
        waves = [event.audio for event in events if event.audio is not None]
        np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.float32), *waves]), reply.audio)
    return reply


def _serve(omni, work, slots=2, waiting=64, closing=30.0, running=None):
    async def inside():
        service = Service(running or Running(omni, slots), waiting)
        service.start()
        try:
            return await work(service)
        finally:
            await service.close(closing)
            assert not service._thread.is_alive()

    return asyncio.run(inside())


async def _until(holds):
    while not holds():
        await asyncio.sleep(0.01)


def _same(reply: Reply, other: Reply):
    assert reply.text == other.text and reply.token_ids == other.token_ids
    if other.audio is None:
        assert reply.audio is None
        return
    np.testing.assert_array_equal(reply.codes, other.codes)
    np.testing.assert_array_equal(reply.audio, other.audio)


def test_replies_are_those_of_generate(omni, expected):
    """Text, pictures, sound and speech side by side, four times as many as there are slots."""

    async def work(service):
        return await asyncio.gather(*(_reply(service, _prompt(omni, *one)) for one in MIXED))

    replies = _serve(omni, work, slots=3)
    assert len(MIXED) == 12 and len({tuple(reply.token_ids) for reply in replies}) > len(WORDS)
    for one, reply in zip(MIXED, replies, strict=True):
        _same(reply, expected[one])


def test_replies_with_a_drafter_are_those_without(omni, expected, drafters):
    asked, drafter = [*((text, False) for text in WORDS[:3]), ("A", True)], load_drafter(drafters("dflash", "tiny"))

    async def work(service):
        return await asyncio.gather(*(_reply(service, _prompt(omni, *one)) for one in asked))

    running = Running(omni, 2, drafter, Drafting(draft_tokens=3))
    for one, reply in zip(asked, _serve(omni, work, running=running), strict=True):
        assert reply.text == expected[one].text and reply.token_ids == expected[one].token_ids
        if one[1]:
            np.testing.assert_array_equal(reply.codes, expected[one].codes)
        usage = Usage(reply.stats["prompt_tokens"])
        usage.add(Event("", [], reply), reply)
        counts = usage.body()["completion_tokens_details"]
        accepted, rejected = (counts[f"{name}_prediction_tokens"] for name in ("accepted", "rejected"))
        assert accepted + rejected == reply.stats["drafted"] > 0 and rejected > 0
        # All but the first token came from rounds.
        assert accepted + reply.stats["rounds"] == len(reply.token_ids) - 1


def test_events_of_a_step_wake_the_clients_side_once(omni, monkeypatch):
    woken, inner = [], asyncio.base_events.BaseEventLoop.call_soon_threadsafe
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "call_soon_threadsafe", lambda loop, call, *given, **more:
                        woken.append(call.__name__) or inner(loop, call, *given, **more))  # fmt: skip

    async def work(service):
        return [event async for event in service.answer(_prompt(omni, "A", max_new_tokens=4))]

    text, last = _serve(omni, work)
    assert woken.count("deliver") == 2 and len(text.token_ids) == 4 and last.reply is not None


def test_a_further_turn_runs_its_new_tokens_in_pieces(omni, monkeypatch):
    """What `Running` is told of pieces and of what is kept reaches the engine."""
    read, inner = [], engine.read_piece
    monkeypatch.setattr(engine, "read_piece", lambda params, token_ids, *a, **k: read.append(token_ids.shape[1])
                        or inner(params, token_ids, *a, **k))  # fmt: skip
    turns = _messages(8 * WORDS[3])
    longer = [*turns, {"role": "assistant", "content": "A"}, *_messages(6 * WORDS[3])]
    prompts = [Prompt(omni.prepare(asked), 0, 4, speech=False) for asked in (turns, longer)]

    async def work(service):
        return [await _reply(service, prompt) for prompt in prompts]

    first, second = _serve(omni, work, running=Running(omni, 2, piece_tokens=16, keep_bytes=1 << 28))
    assert set(read) == {16} and first.stats["cached_tokens"] == 0
    assert second.stats["cached_tokens"] >= first.stats["prompt_tokens"] - 8
    assert len(read) < (first.stats["prompt_tokens"] + second.stats["prompt_tokens"]) // 16
    for reply, asked in zip((first, second), (turns, longer), strict=True):
        assert reply.token_ids == omni.generate(asked, max_new_tokens=4).token_ids


def test_what_cannot_be_is_refused_and_harms_nobody(omni, expected):
    async def work(service):
        bad = Prompt(omni.prepare(_messages("A")), 0, 10**9, speech=False)
        good = asyncio.create_task(_reply(service, _prompt(omni, WORDS[0])))
        with pytest.raises(RequestError) as caught:
            await _reply(service, bad)
        return caught.value, await good

    error, reply = _serve(omni, work)
    assert error.status == 400
    _same(reply, expected[WORDS[0], False])


def test_clients_that_go_free_their_slots(omni, expected):
    async def work(service):
        async def leave():
            async for _ in service.answer(_prompt(omni, WORDS[1], max_new_tokens=400)):
                return

        await asyncio.gather(*(leave() for _ in range(3)))
        reply = await asyncio.wait_for(_reply(service, _prompt(omni, WORDS[0])), 60)
        return reply, service.active

    reply, active = _serve(omni, work, slots=1)
    _same(reply, expected[WORDS[0], False])
    assert active == 0


def test_prompts_of_clients_that_have_gone_wait_no_more(omni):
    """Their places are free at once, so others would join them without end."""
    service, tickets = Service(Running(omni, 1)), [Ticket(None, _prompt(omni, "A")) for _ in range(3)]
    for ticket in tickets:
        service._tickets.put(ticket)
    service._agree(wait=False)
    assert [*service._again] == tickets
    tickets[1].left = True
    service._agree(wait=False)
    assert [*service._again] == [tickets[0], tickets[2]] and [one.ended for one in tickets] == [False, True, False]


def test_texts_are_read_aloud_while_all_slots_are_taken(omni):
    """One prompt more than there are slots is prepared ahead, and counts as waiting."""

    async def work(service):
        long = [
            asyncio.create_task(_reply(service, _prompt(omni, WORDS[1], max_new_tokens=900, stop_ids=())))
            for _ in range(2)
        ]
        await _until(lambda: len(service._following) == 2)
        active, events = [service.active], []
        async for event in service.read_aloud(service.running.said("A", Voice(max_frames=6), 0)):
            events.append(event)
            active.append(service.active)
        left = [task.done() for task in long]
        for task in long:
            task.cancel()
        return events[-1].reply, active, left

    reply, active, left = _serve(omni, work, slots=1)
    _same(reply, omni.speak("A", voice=Voice(max_frames=6)))
    assert left == [False, False] and active[0] == 1 and max(active) == 2


def test_a_sound_that_cannot_be_made_is_one_replys(omni, expected, monkeypatch, capsys):
    """Nothing else runs again for it, as it would if the loop had failed, and its slot comes free."""
    inner = Follower._vocode

    def failing(follower, *given):
        if follower.request.seed == 99:
            raise ValueError("deaf")
        return inner(follower, *given)

    async def work(service):
        others = [asyncio.create_task(_reply(service, _prompt(omni, text, text == "A"))) for text in (WORDS[3], "A")]
        with pytest.raises(RequestError) as caught:
            await _reply(service, _prompt(omni, WORDS[0], speech=True, seed=99, max_new_tokens=90))
        later = await _reply(service, _prompt(omni, WORDS[0]))
        return caught.value, [*await asyncio.gather(*others), later], service

    monkeypatch.setattr(Follower, "_vocode", failing)
    error, replies, service = _serve(omni, work, slots=2)
    assert (error.status, error.code) == (500, "internal_error") and "deaf" in capsys.readouterr().err
    for reply, one in zip(replies, [(WORDS[3], False), ("A", True), (WORDS[0], False)], strict=True):
        _same(reply, expected[one])
    assert service._number == 4 and service.active == 0


@pytest.mark.parametrize("place", ["prefill_in_pieces", "dispatch"])
def test_one_reply_fails_when_memory_ends(omni, expected, monkeypatch, place):
    """That of the longest prompt: when it is admitted, or while it is drawn; the others run again."""
    inner, failed, long = getattr(PlainEngine, place), [], 8 * WORDS[3]

    def failing(engine, *given):
        requests = [request for request in given[1 if place == "prefill_in_pieces" else 2] if request is not None]
        if any(request.seed == 99 and (place == "prefill_in_pieces" or request.token_ids) for request in requests):
            failed.append(True)
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return inner(engine, *given)

    async def work(service):
        monkeypatch.setattr(PlainEngine, place, failing)
        others = [asyncio.create_task(_reply(service, _prompt(omni, text, text == "A"))) for text in (WORDS[0], "A")]
        await asyncio.sleep(1)
        with pytest.raises(RequestError) as caught:
            await _reply(service, _prompt(omni, long, seed=99, max_new_tokens=90))
        return caught.value, await asyncio.gather(*others), service.healthy

    error, (first, second), healthy = _serve(omni, work, slots=3)
    assert error.status == 503 and error.code == "out_of_memory" and failed and healthy
    _same(first, expected[WORDS[0], False])
    _same(second, expected["A", True])


def test_places_are_bounded(omni):
    async def work(service):
        with service.places(2):
            with pytest.raises(RequestError) as caught, service.places(2):
                pass
            with service.places(1):
                assert service.accepted == 3
        with pytest.raises(RequestError) as more, service.places(4):
            pass
        assert service.accepted == 0
        return caught.value, more.value

    full, more = _serve(omni, work, slots=2, waiting=1)
    assert full.status == 429 and int(full.headers()["Retry-After"]) >= 1
    assert more.status == 400 and more.param == "n"


def test_closing_finishes_what_runs(omni, expected):
    async def work(service):
        tasks = [asyncio.create_task(_reply(service, _prompt(omni, text))) for text in WORDS]
        await asyncio.sleep(0.1)
        await service.close(60)
        with pytest.raises(RequestError) as caught, service.places(1):
            pass
        return await asyncio.gather(*tasks), caught.value

    replies, error = _serve(omni, work, slots=2)
    for text, reply in zip(WORDS, replies, strict=True):
        _same(reply, expected[text, False])
    assert error.status == 503


def test_draining_takes_no_more_and_cuts_what_takes_too_long(omni, expected):
    async def work(service):
        async def ask(text, **more):
            with service.places(1):
                return await _reply(service, _prompt(omni, text, **more))

        long = [asyncio.create_task(ask(WORDS[1], max_new_tokens=900, stop_ids=())) for _ in range(2)]
        await asyncio.sleep(0.2)
        draining = asyncio.create_task(service.drain(1.0, lambda: False))
        await asyncio.sleep(0.1)
        assert service.closing and service.healthy and not draining.done()
        with pytest.raises(RequestError, match="shutting down"):
            await ask(WORDS[0])
        await draining
        return await asyncio.gather(*long, return_exceptions=True)

    for error in _serve(omni, work, slots=1):
        assert isinstance(error, RequestError) and (error.status, error.code) == (503, "shutting_down")


def test_draining_waits_for_what_is_prepared(omni, expected):
    """A prompt that comes to the engine after it was told to end is answered, if its request was taken before."""

    async def work(service):
        with service.places(1):
            draining = asyncio.create_task(service.drain(60, lambda: False))
            await asyncio.sleep(0.2)
            reply = await _reply(service, _prompt(omni, WORDS[0]))
        await draining
        return reply

    _same(_serve(omni, work), expected[WORDS[0], False])


def test_a_model_without_a_voice(checkpoints):
    from omni_jax.loading import load

    text_only = load(checkpoints("tiny"), parts=("thinker",))
    running = Running(text_only, 1)
    assert not running.speaks
    with pytest.raises(InputError, match="without its"):
        running.admission(Prompt(text_only.prepare(_messages("A")), 0, 4), 0)


def test_what_is_kept_leaves_less_for_slots(omni, monkeypatch):
    whole = Running(omni)
    caches = whole.plan.caches(whole.slots, 1, 1024, omni.config)
    need = sum(cache.bytes(omni.params, None) for cache in caches)
    monkeypatch.setattr(memory, "available", lambda mesh: need)
    assert Running(omni).slots == whole.slots and 1 <= Running(omni, keep_bytes=need // 2).slots <= whole.slots // 2
    with pytest.raises(MemoryLimitError, match="beside the weights; lower --keep-mib, or set it to 0"):
        Running(omni, keep_bytes=need + 1)


def test_steps_grow_while_they_are_short_and_shrink_at_once():
    pace, now, steps = Pace(), 0.0, []
    for chunk, seconds in enumerate([5.0, *[0.02] * 20, *[0.3] * 3], 1):
        now += seconds
        pace.lap(chunk, pace.steps, now)
        pace.lap(chunk, pace.steps, now + 0.001)  # a step of speech alone
        steps.append(pace.steps)
    assert steps[0] == STREAM_STEPS and steps[1] == STREAM_STEPS + 2
    assert steps[20] == CHUNK and steps[21] < CHUNK / 2 and steps[-1] == STREAM_STEPS
    pace = Pace()
    for chunk in range(1, 20):
        # Steps that are short because a slot is free say how long a token takes.
        pace.lap(chunk, STREAM_STEPS, 0.06 * chunk)
    assert pace.steps == round(STREAM_STEPS * STEP_SECONDS / 0.06)
    steps = pace.steps
    pace.lap(20, 1, 0.06 * 20)
    pace.lap(21, STREAM_STEPS, 0.06 * 21)
    assert pace.steps == steps


def test_steps_are_short_while_a_slot_is_free(omni):
    prompt = _prompt(omni, "A", max_new_tokens=3 * CHUNK, stop_ids=())

    async def sizes(service):
        return [len(event.token_ids) async for event in service.answer(prompt)]

    async def work(service):
        service._pace.steps, service._pace.lap = CHUNK, lambda *_: None
        return await sizes(service), await asyncio.gather(sizes(service), sizes(service))

    alone, both = _serve(omni, work)
    # The prompt's own token comes with the first step.
    assert sum(alone) == 3 * CHUNK and max(alone) <= STREAM_STEPS + 1 < max(max(one) for one in both)
