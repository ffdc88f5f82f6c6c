"""What a client waits for: none of it comes twice, and none is waited for once the server ends."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from omni_jax.decode.prompt import Prompt
from omni_jax.decode.reply import Event, Logprobs
from omni_jax.inputs.batch import Batch
from omni_jax.serve.engine import Service
from omni_jax.serve.errors import RequestError
from omni_jax.serve.tickets import Once


def test_a_second_run_sends_only_what_is_new():
    once = Once()
    logprobs = Logprobs(np.arange(3.0), np.arange(3)[:, None], np.arange(3.0)[:, None])
    once.new(Event("ab", [1, 2], reasoning="x"))
    once.new(Event("", [], audio=np.arange(4.0)))
    once.restart()
    new = once.new(Event("abc", [1, 2, 3], reasoning="xyz", logprobs=logprobs))
    assert (new.text, new.token_ids, new.reasoning) == ("c", [3], "yz")
    assert new.logprobs is not None and new.logprobs.token.tolist() == [2.0]
    for wave, more in (([0.0, 1.0, 2.0], []), ([3.0, 4.0], [4.0])):
        np.testing.assert_array_equal(once.new(Event("", [], audio=np.array(wave))).audio, more)


def test_what_is_prepared_while_the_server_cuts_is_told():
    """A request that passed the door, but has no ticket yet, is not begun any more."""

    async def late():
        service = Service(SimpleNamespace(slots=1, readings=lambda: None))  # pyright: ignore[reportArgumentType]
        service._cancel()
        with pytest.raises(RequestError, match="shutting down"):
            await anext(service.answer(Prompt(Batch.of_text([[1]]), 0, 1, speech=False)))

    asyncio.run(late())
