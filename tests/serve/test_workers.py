"""Workers prepare what `Processor.prepare` does, and survive conversations that hang, crash or grow."""

import asyncio
import os
import time
from dataclasses import fields

import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.files import read_object
from omni_jax.inputs.processor import Processor
from omni_jax.serve.serving import SHORT_CHARACTERS, text_characters
from omni_jax.serve.workers import WorkerLimits, Workers
from tests.helpers.serving import Acting


def _run(work, limits):
    async def inside():
        workers = Workers(Acting(), limits)  # type: ignore[arg-type]
        try:
            return await work(workers)
        finally:
            workers.close()

    return asyncio.run(inside())


def test_a_worker_outlives_what_it_refuses():
    async def work(workers):
        one = await workers.prepare(("say", 1), {"a": 2})
        with pytest.raises(InputError, match="no such thing"):
            await workers.prepare(("refuse", 0), {})
        with pytest.raises(RuntimeError, match="inside"):
            await workers.prepare(("fail", 0), {})
        with pytest.raises(InputError, match="memory"):
            await workers.prepare(("grow", 400), {})
        return one, await workers.prepare(("say", 3), {})

    one, other = _run(work, WorkerLimits(1, 60, 200 << 20))
    assert one[:2] == (1, {"a": 2}) and other[0] == 3 and one[2] == other[2]


@pytest.mark.parametrize("act, message", [("hang", "1 s"), ("crash", "damaged")])
def test_a_worker_that_is_lost_is_replaced(act, message):
    async def work(workers):
        before = await workers.prepare(("say", 1), {})
        with pytest.raises(InputError, match=message):
            await workers.prepare((act, 0), {})
        return before, await workers.prepare(("say", 2), {})

    before, after = _run(work, WorkerLimits(1, 1 if act == "hang" else 60))
    assert after[0] == 2 and before[2] != after[2]
    with pytest.raises(ProcessLookupError):
        os.kill(before[2], 0)


def test_conversations_beside_each_other():
    async def work(workers):
        start = time.monotonic()
        done = await asyncio.gather(*(workers.prepare(("say", i), {}) for i in range(8)))
        hanging = asyncio.create_task(workers.prepare(("hang", 0), {}))
        await asyncio.sleep(0)
        hanging.cancel()  # its client has gone
        return done, await workers.prepare(("say", 9), {}), time.monotonic() - start

    done, last, _ = _run(work, WorkerLimits(2, 60))
    assert [one[0] for one in done] == list(range(8)) and len({one[2] for one in done}) <= 2 and last[0] == 9


def test_batches_are_those_of_the_processor(checkpoints, data_dir):
    directory = checkpoints("tiny")
    config = OmniConfig.from_hf(read_object(directory / "config.json"))
    processor = Processor.from_dir(directory, config)
    content = [
        {"type": "image", "image": (data_dir / "flower.jpg").read_bytes(), "max_pixels": 4096},
        {"type": "text", "text": "What is it?"},
    ]
    messages = {"messages": [{"role": "user", "content": content}], "tools": None}

    async def inside():
        workers = Workers(processor, WorkerLimits(1))
        try:
            return await workers.prepare(messages, {"media": {}, "enable_thinking": None})
        finally:
            workers.close()

    found, expected = asyncio.run(inside()), processor.prepare(messages)
    for field in fields(expected):
        if isinstance(array := getattr(expected, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(found, field.name), array)
    np.testing.assert_array_equal(found.vision[0].patches, expected.vision[0].patches)


def test_text_alone_needs_no_process_of_its_own():
    text, picture = {"type": "text", "text": "a"}, {"type": "image", "image": b""}
    for content, is_text in (
        ("a", True),
        ([text, text], True),
        ([text, picture], False),
        ([{"type": "image", "text": "a"}], False),
        ([text | {"text": b"a"}], False),
        (None, False),
    ):
        assert (text_characters([{"role": "user", "content": content}]) is not None) == is_text
    assert text_characters(["a"]) is None


def test_all_that_is_text_counts():
    plain = text_characters([{"role": "user", "content": "a"}])
    assert plain is not None and plain < 30
    long = {"reasoning_content": "a" * SHORT_CHARACTERS}, {"tool_calls": [{"arguments": {"a" * SHORT_CHARACTERS: 1}}]}
    for more in long:
        found = text_characters([{"role": "user", "content": "a", **more}])
        assert found is not None and found > SHORT_CHARACTERS
    found = text_characters([{"role": "user", "content": "a"}], [{"function": {"name": "a" * SHORT_CHARACTERS}}])
    assert found is not None and found > SHORT_CHARACTERS
