"""Requests that run side by side are followed one by one: each gives the pieces that its stream gives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from omni_jax.decode.answers import STREAM_FRAMES, STREAM_STEPS, Follower
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Event, Reply
from omni_jax.decode.request import Request
from omni_jax.omni import Omni
from omni_jax.settings import Ending, Sampling, Settings, Voice
from tests.parity import audio_part, user

ASKED: list[tuple[list[dict], dict[str, Any], int]] = [
    (user("One."), {}, 30),
    (user("Two, at length."), {"sampling": Sampling(1.0, logprobs=2), "stop": "e"}, 40),
    (user(audio_part(1.1, 2)), {"sampling": Sampling(1.2)}, 12),
    (user("Four."), {"speech": False, "stop": ["ab", "q"]}, 25),
]
CALL: dict[str, Any] = {"speech": True, "max_frames": 30, "stop_ids": ()}


def followed(omni: Omni) -> dict[int, list[Event]]:
    """The events of each prompt, all of them in two slots."""
    settings = Settings(voice=Voice(max_frames=30), ending=Ending(stop_ids=()))
    plan, generator = omni._plan(settings, settings.ending, True, None, 1), omni._make_generator()
    prompts = [replace(Prompt(omni.prepare(m), i, new), **own) for i, (m, own, new) in enumerate(ASKED)]
    waiting = iter([generator.alone(plan, prompt, i, 2) for i, prompt in enumerate(prompts)])
    omni._read_weights()
    batching = generator.batching(plan, 2, waiting=waiting, steps=STREAM_STEPS, frames=STREAM_FRAMES)
    followers: dict[Request, Follower] = {}
    events: dict[int, list[Event]] = {}
    for done in batching.run():
        for request in [*done, *(request for request in batching.rows if request is not None)]:
            follower = followers.setdefault(request, Follower(request, omni.processor.tokenizer, omni._make_vocoder))
            events.setdefault(request.number, []).extend(follower.events())
        for request in done:
            events[request.number].append(followers[request].last({}, batching.times))
    return events


def test_each_request_gives_the_pieces_of_its_stream(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("small")
    got = followed(omni)
    for number, (messages, own, new) in enumerate(ASKED):
        sampling: Sampling = own.get("sampling", Sampling())
        keywords = {**CALL, **vars(sampling), "stop": own.get("stop"), "seed": number, "max_new_tokens": new}
        if own.get("speech") is False:
            keywords = {name: value for name, value in keywords.items() if name not in ("speech", "max_frames")}
        want = list(omni.stream(messages, **keywords))
        check(got[number], want)
    assert len({len(events) for events in got.values()}) > 1


def check(got: list[Event], want: list[Event]) -> None:
    def last(events: list[Event]) -> Reply:
        assert all(event.reply is None for event in events[:-1]) and events[-1].reply is not None
        return events[-1].reply

    ours, theirs = last(got), last(want)
    assert ours.text == theirs.text == "".join(event.text for event in got)
    assert ours.token_ids == theirs.token_ids == [token for event in got for token in event.token_ids]
    assert ours.stats.get("stop_string") == theirs.stats.get("stop_string")
    assert (ours.logprobs is None) == (theirs.logprobs is None)
    if ours.logprobs is not None:
        pieces = [event.logprobs for event in got[:-1] if event.token_ids]
        assert sum(len(piece.token) for piece in pieces if piece is not None) == len(ours.token_ids)
    assert (ours.audio is None) == (theirs.audio is None)
    if ours.audio is not None and theirs.audio is not None:
        sounds = [event.audio for event in got if event.audio is not None]
        np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.float32), *sounds]), ours.audio)
        assert ours.codes is not None and theirs.codes is not None
        np.testing.assert_array_equal(ours.codes, theirs.codes)
        np.testing.assert_array_equal(ours.audio, theirs.audio)
        assert len(sounds) > 1, "in pieces"
