"""The first sound of a reply that is heard while it is made follows its first frame, which follows its second token."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import omni_jax.decode.engine
import omni_jax.decode.speech.speakers
from omni_jax.decode.answers import STREAM_FRAMES, STREAM_STEPS
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Event
from omni_jax.decode.speech.talker_loop import decode_frames, prefill_talker
from omni_jax.decode.speech.vocode import samples_of, vocode_chunk
from omni_jax.decode.text import decode_chunk, prefill
from omni_jax.omni import Omni
from omni_jax.settings import Voice
from tests.parity import user

# Frame t is made with token t + 1, and the prompt gives the first one.
TOKENS, NEW, FRAMES = 2, 60, 50
SPOKEN: dict[str, Any] = {"speech": True, "stop_ids": (), "max_new_tokens": NEW, "max_frames": FRAMES}
PROGRAMS: list[Any] = [prefill, decode_chunk, prefill_talker, decode_frames, vocode_chunk]


class Made:
    """What the device was told to make: tokens of each chunk, the prompt's own not among them, and frames of each step.

    Both are those of the row that has most of them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.tokens, self.frames = list[int](), list[int]()

        def chunk(params: dict, state: Any, steps: Any, *rest: Any, **static: Any) -> Any:
            self.tokens.append(int(steps))
            return decode_chunk(params, state, steps, *rest, **static)

        def step(
            params: dict, embed: Any, state: Any, text_ids: Any, frames: np.ndarray, *rest: Any, **static: Any
        ) -> Any:
            self.frames.append(int(frames.max()))
            return decode_frames(params, embed, state, text_ids, frames, *rest, **static)

        monkeypatch.setattr(omni_jax.decode.engine, "decode_chunk", chunk)
        monkeypatch.setattr(omni_jax.decode.speech.speakers, "decode_frames", step)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


def one_frame(omni: Omni) -> int:
    """Samples of the first frame."""
    assert omni.config.code2wav is not None
    return samples_of(omni.config.code2wav, 1)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "seed": 3, "stop": ["never so"]}], ids=["greedy", "drawn"]
)
def test_a_stream_is_heard_from_its_first_frame_on(settings: dict, omnis: Callable[[str], Omni], made: Made) -> None:
    omni = omnis("tiny")
    whole = omni.generate(user("Tell me."), **SPOKEN, **settings)
    programs = [program._cache_size() for program in PROGRAMS]
    made.tokens.clear(), made.frames.clear()
    shown, events = 0, omni.stream(user("Tell me."), **SPOKEN, **settings)
    waves: list[np.ndarray] = []
    for event in events:
        shown += len(event.token_ids) if not waves else 0
        if event.audio is not None:
            if not waves:
                assert shown == TOKENS and 1 + sum(made.tokens) == TOKENS, "no more text, on the device either"
                assert made.frames == [1] and len(event.audio) == one_frame(omni)
            waves.append(event.audio)
    np.testing.assert_array_equal(np.concatenate(waves), whole.audio)
    # Each step at first doubles what there is; later ones are as long as those of any stream.
    assert made.tokens[:6] == [1, 1, 2, 4, STREAM_STEPS, STREAM_STEPS] and max(made.tokens) == STREAM_STEPS
    assert made.frames[:6] == [1, 1, 2, *[STREAM_FRAMES] * 3] and max(made.frames) == STREAM_FRAMES
    assert [program._cache_size() for program in PROGRAMS] == programs, "no program of another size"


def test_drafts_leave_the_first_sound_where_it_is(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Any], made: Made
) -> None:
    """One round of drafts at first, whatever it gives; the same codes and samples."""
    from omni_jax import load_drafter

    omni = omnis("tiny")
    want, settings = omni.generate(user("Tell me."), **SPOKEN), {"drafter": load_drafter(drafters("dflash", "tiny"))}
    made.frames.clear()
    waves: list[np.ndarray] = []
    for event in omni.stream(user("Tell me."), draft_tokens=4, **SPOKEN, **settings):
        if event.audio is not None:
            assert waves or made.frames == [1] and len(event.audio) == one_frame(omni)
            waves.append(event.audio)
    np.testing.assert_array_equal(np.concatenate(waves), want.audio)


def test_whole_replies_are_made_in_long_steps(omnis: Callable[[str], Omni], made: Made) -> None:
    omni = omnis("tiny")
    omni.generate(user("Tell me."), **SPOKEN)
    assert made.tokens == [32, 32] and made.frames == [32, FRAMES - 32]
    made.tokens.clear()
    list(omni.stream(user("Tell me."), stop_ids=(), max_new_tokens=NEW))
    assert set(made.tokens) == {STREAM_STEPS}, "text that is not spoken"


def served(omni: Omni, slots: int, ask: Callable) -> Any:
    """What `ask(service)` gives, of a service with a number of slots."""
    pytest.importorskip("starlette")
    from omni_jax.serve.engine import Service
    from omni_jax.serve.running import Running

    async def run() -> Any:
        service = Service(Running(omni, slots))
        service.start()
        try:
            return await ask(service)
        finally:
            await service.close(60)

    return asyncio.run(run())


def test_a_server_is_heard_from_the_first_frame_on(omnis: Callable[[str], Omni], made: Made) -> None:
    omni = omnis("tiny")
    asked = omni.prepare(user("Tell me."))

    def prompt(seed: int) -> Prompt:
        return Prompt(asked, seed, NEW, speech=True, voice=Voice(max_frames=FRAMES), stop_ids=())

    async def events(service: Any, seed: int) -> list[Event]:
        return [event async for event in service.answer(prompt(seed))]

    async def alone(service: Any) -> list[Event]:
        return await events(service, 0)

    async def crowd(service: Any) -> list[list[Event]]:
        return await asyncio.gather(*(events(service, seed) for seed in range(4)))

    want = omni.generate(user("Tell me."), **SPOKEN)
    made.tokens.clear(), made.frames.clear()
    heard = served(omni, 1, alone)
    first = next(i for i, event in enumerate(heard) if event.audio is not None)
    assert sum(len(event.token_ids) for event in heard[:first]) == TOKENS and len(heard[first].audio) == one_frame(omni)
    assert made.tokens[:4] == [1, 1, 2, 4] and made.frames[:4] == [1, 1, 2, 4]
    made.tokens.clear()
    replies = served(omni, 1, crowd)
    for reply in (heard, replies[0]):
        sound = np.concatenate([event.audio for event in reply if event.audio is not None])
        np.testing.assert_array_equal(sound, want.audio)
    # While others wait for the row, only the first step is short; the last reply has the row for itself.
    assert [made.tokens.count(n) for n in (1, 2, 4)] == [len(replies) + 1, 1, 1]
    for reply in replies:
        assert next(len(event.audio) for event in reply if event.audio is not None) == one_frame(omni)


def test_a_text_that_is_read_aloud_is_heard_from_the_first_frame_on(omnis: Callable[[str], Omni], made: Made) -> None:
    omni, text, voice = omnis("tiny"), "Read this aloud, please, and then read on.", Voice(max_frames=FRAMES)

    async def read(service: Any) -> list[Event]:
        said = service.running.said(text, voice, 0)
        return [event async for event in service.read_aloud(said)]

    heard = [event.audio for event in served(omni, 1, read) if event.audio is not None]
    assert len(heard[0]) == one_frame(omni) and made.frames[:4] == [1, 1, 2, 4]
    np.testing.assert_array_equal(np.concatenate(heard), omni.speak(text, voice=voice).audio)
