"""What a client waits for: none of it comes twice."""

import numpy as np

from omni_jax.decode.reply import Event, Logprobs
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
