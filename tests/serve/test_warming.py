"""What a server compiles before it takes requests, and what is left to compile afterwards."""

import asyncio
from string import ascii_lowercase

import numpy as np
import pytest

from omni_jax.decode.prompt import Prompt
from omni_jax.decode.shares import compilations
from omni_jax.serve.engine import Service
from omni_jax.serve.running import Running
from omni_jax.serve.warming import Warming, lengths, of_length
from omni_jax.settings import Sampling, Voice

PIECE, MOST = 32, 90


@pytest.fixture(scope="module")
def omni(omnis):
    return omnis("tiny")


def test_each_shape_has_a_length():
    assert lengths(10, 40, None) == [12, 13, 16, 17, 24, 25, 32, 33, 40]
    # Beyond a piece, the longest prompts with last pieces of 2, 8 and 32 tokens in caches of 256 and 512 positions.
    assert lengths(10, 300, 32) == [12, 13, 16, 17, 24, 25, 32, 192, 194, 200, 288, 290, 296]
    assert lengths(10, 5, 32) == []


def test_prompts_have_the_lengths(omni):
    for tokens in (20, 47, 90):
        batch = of_length(omni, tokens, " ab")
        assert batch.mask.sum() == tokens == batch.token_ids.shape[1] == batch.position_ids.shape[-1]
        whole = omni.prepare([{"role": "user", "content": " ab" * 200}]).token_ids[0]
        assert (batch.token_ids[0, :6] == whole[:6]).all() and (batch.token_ids[0, -5:] == whole[-5:]).all()


def test_what_was_compiled_is_not_compiled_again(omni):
    running = Running(omni, 2, piece_tokens=PIECE, keep_bytes=1 << 28)
    draw = np.random.default_rng(0)

    async def reply(service, word, **kind):
        prompt = Prompt(of_length(omni, int(draw.integers(12, MOST)), word), 1, 40, **kind)
        return [event async for event in service.answer(prompt)][-1].reply

    async def work():
        service = Service(running)
        service.start()
        try:
            with compilations() as first:
                await Warming(service, MOST, Voice()).run()
            with compilations() as later:
                kinds = [{"speech": False}, {"speech": True, "voice": Voice(max_frames=8)},
                         {"speech": False, "sampling": Sampling(temperature=0.7)}]  # fmt: skip
                replies = [reply(service, f" {ascii_lowercase[i]}", **kinds[i % 3]) for i in range(12)]
                await asyncio.gather(*replies)
            return len(first), list(later)
        finally:
            await service.close(30)

    before, after = asyncio.run(work())
    assert before > 50 and not after
