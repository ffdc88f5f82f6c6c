"""Requests as replies, once they are done, and as the events of a stream while they run.

Batching -> token ids -> text ------------.
         `-> frames of codes -> waveform --+-> Reply, or Events as they come
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from omni_jax.decode.batching import Batching
from omni_jax.decode.reasoning import ReasoningSplitter, split_reasoning
from omni_jax.decode.reply import Event, Logprobs, Reply
from omni_jax.decode.request import Request
from omni_jax.decode.shares import Shares, compilations
from omni_jax.decode.speech.vocode import Vocoder
from omni_jax.decode.stops import StopStrings
from omni_jax.inputs.tokenizer import Tokenizer

# Tokens, and frames of speech, between two events of a stream; and frames of its first event of speech.
STREAM_STEPS = 8
STREAM_FRAMES = 4
FIRST_FRAMES = 1

# Codes int32 [B, Q, F] and the frames of each row, to a waveform for each row, float32 [samples].
Vocode = Callable[[np.ndarray, list[int]], list[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Waveform:
    """The waveform of a request, float32 [samples], and the seconds that the vocoder took."""

    wave: np.ndarray
    seconds: float


def replies_together(
    batching: Batching, requests: Sequence[Request], tokenizer: Tokenizer, vocode: Vocode
) -> list[Reply]:
    """The replies of requests that run all at once, in their order."""
    batching.finish()
    sounds = sounds_of(requests, vocode)
    replies = zip(requests, sounds, strict=True)
    return [
        reply_of(request, batching.engine.stats(request), tokenizer, batching.times, sound)
        for request, sound in replies
    ]


def replies_in_turn(batching: Batching, tokenizer: Tokenizer, vocode: Vocode) -> Iterator[tuple[int, Reply]]:
    """The number of each prompt, and its reply, as they end; the device works on while the caller looks at one.

    Their stats hold `seconds` until the text was done, and the reply's share of the time of all; see `shares`.
    """
    with compilations() as compiled:
        shares = Shares(compiled)
        for done in batching.run():
            shares.lap([*done, *(request for request in batching.rows if request is not None)])
            for request in done:
                (sound,) = sounds_of([request], vocode)
                shares.lap([request])
                stats, times = batching.engine.stats(request), {"seconds": request.seconds, **shares.take(request)}
                yield request.number, reply_of(request, stats, tokenizer, times, sound)
                shares.skip()


class Follower:
    """Follows one request of a `Batching`, alone or among others: its events as they come, and at last its reply.

    for done in batching.run():
        events = follower.events()          # after each step: text and tokens, then speech
        if follower.request in done:
            event = follower.last(batching.engine.stats(follower.request), batching.times)
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, make_vocoder: Callable[[], Vocoder] | None = None):
        """make_vocoder: gives the vocoder of this request, once it speaks; None if its speech is not wanted."""
        self.request, self._tokenizer, self._make_vocoder = request, tokenizer, make_vocoder
        self._text = (request.limits.stops or StopStrings(tokenizer, ())).watch()
        self._splitter = ReasoningSplitter(request.begins_inside_reasoning)
        self._vocoder: Vocoder | None = None
        self._waves = [np.zeros(0, np.float32)]
        self._written, self._seconds, self._heard = 0, 0.0, False

    def events(self) -> Iterator[Event]:
        """What has come since the last call, none of it twice: an event of text, one of speech, or neither."""
        request, speaker = self.request, self.request.speaker
        if new := request.token_ids[self._written :]:
            self._text.add(new)
            piece = self._splitter.add(self._text.piece())
            logprobs = logprobs_of(request, self._written)
            self._written += len(new)
            yield Event(piece.text, new, logprobs=logprobs, reasoning=piece.reasoning)
        if self._make_vocoder is None or speaker is None or not speaker.made or self._heard:
            return
        self._heard = speaker.done or request.complete
        wave = self._vocode(speaker.codes, self._make_vocoder)
        if wave.size:
            yield Event("", [], audio=wave)

    def last(self, drafting: dict[str, Any], times: dict[str, float]) -> Event:
        """The event that ends a request that is complete, once all others were taken: it carries the whole reply.

        drafting, times: as in `reply_of`.
        """
        sound = None if self._make_vocoder is None else Waveform(np.concatenate(self._waves), self._seconds)
        reply = reply_of(self.request, drafting, self._tokenizer, times, sound)
        piece = self._splitter.add(self._text.last_piece(), last=True)
        return Event(piece.text, [], reply, reasoning=piece.reasoning)

    def _vocode(self, codes: np.ndarray, make_vocoder: Callable[[], Vocoder]) -> np.ndarray:
        """The samples that can be heard of the new frames of codes int32 [Q, frames], float32 [samples]."""
        start = perf_counter()
        if self._vocoder is None:
            self._vocoder = make_vocoder()
        self._waves.append(self._vocoder.follow(codes, self._heard))
        self._seconds += perf_counter() - start
        return self._waves[-1]


def events_of(
    batching: Batching, request: Request, tokenizer: Tokenizer, make_vocoder: Callable[[], Vocoder] | None
) -> Iterator[Event]:
    """The events of one request that runs alone; it speaks if there can be a vocoder."""
    follower = Follower(request, tokenizer, make_vocoder)
    for _ in batching.run():
        yield from follower.events()
    yield follower.last(batching.engine.stats(request), batching.times)


def sounds_of(requests: Sequence[Request], vocode: Vocode) -> list[Waveform | None]:
    """The sound of each request, None for those that do not speak."""
    speakers = [request.speaker for request in requests if request.speaker is not None]
    if not speakers:
        return [None for _ in requests]
    start = perf_counter()
    lengths = [speaker.made for speaker in speakers]
    padded = np.stack([np.pad(s.codes, ((0, 0), (0, max(lengths) - s.made))) for s in speakers])
    waves = iter(vocode(padded, lengths))
    seconds = perf_counter() - start
    return [None if request.speaker is None else Waveform(next(waves), seconds) for request in requests]


def reply_of(
    request: Request, drafting: dict[str, Any], tokenizer: Tokenizer, times: dict[str, float], sound: Waveform | None
) -> Reply:
    """The reply of a request that is done; drafting, times: what its stats report of these."""
    stats = {
        "prompt_tokens": request.prompt_tokens,
        "new_tokens": len(request.token_ids),
        "finish_reason": "cancelled" if request.cancelled else "stop" if request.stopped else "length",
        **({} if request.watch is None else {"stop_string": request.stop_string}),
        **times,
        **drafting,
    }
    text = tokenizer.decode(request.token_ids) if request.watch is None else request.watch.text()
    text, reasoning = split_reasoning(text, request.begins_inside_reasoning)
    reply = Reply(text, request.token_ids, stats, logprobs=logprobs_of(request), reasoning=reasoning)
    if request.speaker is None or sound is None:
        return reply
    spoken = request.speaker.stats(sound.wave) | {"vocoder_seconds": sound.seconds}
    return replace(reply, stats=stats | spoken, audio=sound.wave, codes=request.speaker.codes)


def logprobs_of(request: Request, since: int = 0) -> Logprobs | None:
    """The log-probabilities of a request's tokens from number `since` on; None if they are not wanted."""
    if request.logprobs is None:
        return None
    reports = request.reports(since)
    floats, k = reports.view(np.float32), reports.shape[1] // 2 - 1
    return Logprobs(floats[:, 1].copy(), reports[:, 2 : 2 + k].copy(), floats[:, 2 + k :].copy())
