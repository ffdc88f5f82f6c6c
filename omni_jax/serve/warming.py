"""Have a server's programs compiled before it takes requests, by requests of its own.

    most tokens of a prompt -> lengths, one for each shape that the compiler sees -> replies of two tokens

Prompts go from short to long, because caches grow with the longest reply that runs. What cannot be foreseen compiles
when it first occurs: media of other sizes, and rarer ways of drawing.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from string import ascii_lowercase
from typing import Any

import numpy as np

from omni_jax.decode.answers import STREAM_STEPS
from omni_jax.decode.pieces import PARTS
from omni_jax.decode.prompt import Prompt
from omni_jax.decode.text import CHUNK
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.speech import HEADER, OPENING
from omni_jax.omni import Omni
from omni_jax.ops.cache import capacity_for
from omni_jax.serve.engine import Service
from omni_jax.settings import Sampling, Voice

# What requests ask for, as far as prompts differ by it: what the server's flags say, a reply that goes on behind the
# end of its turn, and another way of drawing; and further ways of drawing, by which only the later tokens differ.
KINDS: tuple[dict[str, Any], ...] = ({}, {"stop_ids": ()}, {"sampling": Sampling(temperature=1.0)})
DRAWN: tuple[dict[str, Any], ...] = ({"sampling": Sampling(temperature=1.0, top_k=20)},)
# Tokens and frames of a reply; as many as fill a chunk are allowed, which decides how long its cache is.
TOKENS, ALLOWED, FRAMES = 2, CHUNK + 1, 12
POLL_SECONDS = 0.1
# Of a picture, in pixels, and of a sound, in seconds.
SIDE, SECONDS, SAMPLES_PER_SECOND = 224, 2, 16_000


class Warming:
    """Runs replies of all kinds to prompts of up to `tokens` tokens, as far as the model's context allows."""

    def __init__(self, service: Service, tokens: int, voice: Voice):
        """voice: in which replies are spoken, where the model speaks."""
        running = service.running
        self._service, self._omni, self._piece = service, running.omni, running.piece
        self._shortest = _tokens(self._omni.prepare(_asked("a")))
        self._most = min(tokens, self._omni.config.thinker.text.max_position_embeddings - ALLOWED)
        self._spoken: dict[str, Any] | None = None
        if running.speaks:
            self._spoken = {"speech": True, "voice": replace(voice, max_frames=FRAMES)}
        self._words = (" " + ascii_lowercase[i // 26 % 26] + ascii_lowercase[i % 26] for i in count())

    async def run(self) -> None:
        """Run them all, one after the other."""
        found = lengths(self._shortest, self._most, self._piece)
        for length in found:
            # Each in words of its own, so that none goes on from an earlier one.
            for kind in KINDS:
                await self._answer(self._prompt(length, **kind))
        if self._spoken is not None:
            for length in spoken_lengths(self._shortest, self._most):
                await self._answer(self._prompt(length, **self._spoken))
        for part in _media():
            batch = self._omni.prepare(_asked([part, {"type": "text", "text": "a"}]))
            for kind in ({}, self._spoken):
                if kind is not None and _tokens(batch) <= self._most:
                    await self._answer(_answered(batch, **kind))
        await self._go_on(found)
        if self._service.running.slots > 1:
            await self._beside(found)

    async def _go_on(self, found: list[int]) -> None:
        """Further turns, with last pieces of each size, in caches of each size."""
        last = {capacity_for(length + ALLOWED): length for length in found}
        for length in last.values():
            for size in _last_pieces(self._piece):
                for kind in KINDS:
                    word = next(self._words)
                    # The end of the first is none of the second, so that a few more tokens than these are new.
                    begun = length - size + self._shortest
                    if self._shortest < begun < length:
                        await self._answer(self._prompt(begun, word, **kind))
                        await self._answer(self._prompt(length, word, **kind))

    async def _beside(self, found: list[int]) -> None:
        """Short ones beside a long one, which decides how long all caches are."""
        last = {capacity_for(length + ALLOWED): length for length in found}
        for length in last.values():
            # It draws what stays within the cache of this length.
            long = self._prompt(length, ends=partial(_has, CHUNK - STREAM_STEPS))
            short = [self._prompt(n) for n in last.values() if n <= length]
            await asyncio.gather(*map(self._answer, [long, *short]))
            for kind in DRAWN:
                await self._answer(self._prompt(length, **kind))

    def _prompt(self, tokens: int, word: str | None = None, **kind: Any) -> Prompt:
        """A prompt of so many tokens."""
        return _answered(of_length(self._omni, tokens, word or next(self._words)), **kind)

    async def _answer(self, prompt: Prompt) -> None:
        async for _ in self._service.answer(prompt):
            pass


async def warm(service: Service, tokens: int, voice: Voice, ended: Callable[[], bool]) -> bool:
    """Warm up unless `ended` meanwhile: whether all has run."""
    warming = asyncio.create_task(Warming(service, tokens, voice).run())
    while not ended() and not warming.done():
        await asyncio.wait([warming], timeout=POLL_SECONDS)
    if not warming.done():
        warming.cancel()
        return False
    warming.result()
    return True


def lengths(shortest: int, most: int, piece: int | None) -> list[int]:
    """The numbers of tokens of prompts that differ for the compiler, rising; piece: as in `Running`."""
    whole = most if piece is None else min(most, piece)
    # Of each bucket the longest, and the shortest, whose cache may be smaller.
    sizes = sorted({bucket(n) for n in range(shortest, whole + 1)})
    found = {min(size, whole) for size in sizes} | {size + 1 for size in sizes if size < whole}
    if piece is not None and most > piece:
        capacity, longest = capacity_for(piece + ALLOWED), 0
        while longest < most:
            # The longest prompt of each size of a last piece.
            longest = min(most, capacity - ALLOWED)
            found |= {(longest - last) // piece * piece + last for last in _last_pieces(piece) if last <= longest}
            capacity *= 2
    return sorted(n for n in found if shortest <= n <= most)


def spoken_lengths(shortest: int, most: int) -> list[int]:
    """The numbers of tokens of prompts whose speech differs for the compiler, rising."""
    more = OPENING - HEADER
    sizes = {bucket(n + more) for n in range(shortest, most + 1)}
    return sorted(min(size - more, most) for size in sizes)


def of_length(omni: Omni, tokens: int, word: str) -> Batch:
    """A prompt of so many tokens, at least as many as one word has, that repeats a word."""
    one, many = (_tokens(omni.prepare(_asked(word * n))) for n in (1, 33))
    batch = omni.prepare(_asked(word * (1 + -(-max(tokens - one, 0) * 32 // (many - one)))))
    T = min(tokens, _tokens(batch))
    # What is too much goes from the middle of the words, whose positions follow each other.
    kept = np.r_[: T - one // 2, _tokens(batch) - one // 2 : _tokens(batch)]
    names = ("token_ids", "mask", "visual_index", "audio_index")
    cut = {name: getattr(batch, name)[:, kept] for name in names}
    return replace(batch, position_ids=batch.position_ids[..., :T], **cut)


def _last_pieces(piece: int | None) -> list[int]:
    return [] if piece is None else [max(1, piece // part) for part in PARTS]


def _tokens(batch: Batch) -> int:
    return int(batch.mask.sum())


def _asked(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _answered(batch: Batch, **kind: Any) -> Prompt:
    return Prompt(batch, 0, ALLOWED, **{"speech": False, "ends": partial(_has, TOKENS), **kind})


def _has(number: int, token_ids: list[int]) -> bool:
    return len(token_ids) >= number


def _media() -> Iterator[dict[str, Any]]:
    """A picture and a sound."""
    yield {"type": "image", "image": np.zeros((SIDE, SIDE, 3), np.uint8)}
    silence = np.zeros(SECONDS * SAMPLES_PER_SECOND, np.float32)
    yield {"type": "audio", "audio": silence, "sampling_rate": SAMPLES_PER_SECOND}
