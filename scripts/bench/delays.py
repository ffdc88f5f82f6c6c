"""Measure two delays of a server: of streams while a long prompt is read, and of a conversation's second turn.

    python -m scripts.bench delays --model nano --flags="--warmup 4096"

Streams write on, whatever ends a reply, while another client sends a prompt of many words: measured are the longest
gaps between two pieces of a stream before the prompt comes and while it is read, and the time to its first token. The
first turn of a conversation is a picture and as many words; the second one adds a question. Each repetition has other
words; those of the warm-up are not counted.
"""

import asyncio
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from scripts.bench.compare import write_json
from scripts.bench.options import Delays
from scripts.bench.serving import model_of
from scripts.bench.serving_client import Address, Answer, ask
from scripts.bench.serving_prompts import made_image
from scripts.served import served

WORDS = "zero one two three four five six seven eight nine".split()
POLL_SECONDS, SECOND_TOKENS = 0.005, 4
Figures = dict[str, float]


def report(options: Delays) -> None:
    """Measure, print the table, and write the JSON if asked for."""
    with opened(options) as address:
        found = asyncio.run(measure(address, options))
    for name, value in found.items():
        print(f"{name:52}{value:10.4g}")
    write_json(options.json, options, found)


@contextmanager
def opened(options: Delays) -> Iterator[Address]:
    """The server of the options: the one that runs at the URL, or one of this checkout that runs meanwhile."""
    if options.url is not None:
        yield Address.read(options.url)
        return
    assert options.model is not None
    flags = "--slots", str(options.streams + 1), "--text-only", *shlex.split(options.flags)
    with served(options.model, *flags) as found:
        yield Address.read(found.url)


async def measure(address: Address, options: Delays) -> Figures:
    """Medians over the repetitions, and of gaps the longest too, in milliseconds."""
    model, rows = await model_of(address), []
    for number in range(options.warm_up + options.repeats):
        row = await gaps(address, model, options, number) | await turns(address, model, options, number)
        rows += [row] if number >= options.warm_up else []
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    found["longest gap of all, ms"] = max(row["longest gap while the prompt is read, ms"] for row in rows)
    return found


async def gaps(address: Address, model: str, options: Delays, number: int) -> Figures:
    """The longest gaps of the streams before a long prompt comes and while it is read, and its first token."""
    clock, answers = _clock(), [Answer(i, "stream") for i in range(options.streams)]
    endless = {"max_tokens": options.new, "ignore_eos": True}
    async with asyncio.TaskGroup() as group:
        streams = [
            group.create_task(ask(address, _body(model, words(8, [number, i]), **endless), one, clock, 600.0, []))
            for i, one in enumerate(answers)
        ]
        while any(len(one.texts) < 3 and one.failure is None and one.finish is None for one in answers):
            await asyncio.sleep(POLL_SECONDS)
        long = await _asked(address, _body(model, words(options.words, [number]), max_tokens=2), clock)
        for stream in streams:
            stream.cancel()
    _require([*answers, long])
    if ended := sum(one.finish is not None for one in answers):
        raise InputError(f"{ended} streams ended before the long prompt was read; raise --new")
    pieces = [pair for one in answers for pair in pairwise(one.texts)]
    before = [1000 * (b - a) for a, b in pieces if b <= long.sent]
    while_read = [1000 * (b - a) for a, b in pieces if b > long.sent and a < long.texts[0]]
    return {
        "tokens of the long prompt": float((long.usage or {})["prompt_tokens"]),
        "its first token, ms": 1000 * (long.texts[0] - long.sent),
        "longest gap before it came, ms": max(before, default=0.0),
        "longest gap while the prompt is read, ms": max(while_read, default=0.0),
    }


async def turns(address: Address, model: str, options: Delays, number: int) -> Figures:
    """The time to the first token of a conversation's first turn, with a picture and many words, and of its second."""
    clock, seen = _clock(), {"type": "image_url", "image_url": {"url": made_image(number)}}
    content = [seen, {"type": "text", "text": words(options.words, [number, 1, 1])}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    first = await _asked(address, _body(model, messages, max_tokens=SECOND_TOKENS), clock)
    messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Which digit is first?"}]
    second = await _asked(address, _body(model, messages, max_tokens=SECOND_TOKENS), clock)
    _require([first, second])
    sooner = [1000 * (one.texts[0] - one.sent) for one in (first, second)]
    return {"first turn, first token, ms": sooner[0], "second turn, first token, ms": sooner[1],
            "times sooner": sooner[0] / sooner[1]}  # fmt: skip


def words(count: int, seed: Sequence[int]) -> str:
    """A text of so many words."""
    return " ".join(np.random.default_rng(list(seed)).choice(WORDS, count))


def _body(model: str, asked: str | list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": messages, "temperature": 0, **stream, **more}


async def _asked(address: Address, body: dict[str, Any], clock: Callable[[], float]) -> Answer:
    answer = Answer(0, "one")
    await ask(address, body, answer, clock, 600.0, [])
    return answer


def _require(answers: Sequence[Answer]) -> None:
    """InputError for a request that failed, or had no text."""
    for one in answers:
        if one.failure or not one.texts:
            raise InputError(f"a request failed: {one.failure or 'no text'} {one.detail}".strip())


def _clock() -> Callable[[], float]:
    begin = time.perf_counter()
    return lambda: time.perf_counter() - begin
