"""What programs keep of the rows of a batch, and which shapes reach the compiler."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.decode.limits import seeds_of, stop_ids_of
from omni_jax.decode.request import row_keys
from omni_jax.decode.sampling import Plan
from omni_jax.decode.text import NO_TOKEN, PrefillInput, Rows, _seen_in_prompt, decode_chunk, prefill, record
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.weights.drafters import load_drafter
from tests.parity import user

PENALISED = Plan(True, True, 0)


def test_padding_is_not_seen() -> None:
    ids = np.array([[5, 6, 7], [3, 0, 0], [0, 4, 0]], np.int32)
    request = PrefillInput(ids, np.array([3, 1, 2]), ids, ids[:, 0], np.ones(6), jnp.zeros(6), ids[0], {})
    seen = np.asarray(_seen_in_prompt(request, 9))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[5, 6, 7]] * 2 + [[3]] * 2 + [[0, 4]] * 2


def test_a_row_that_is_done_sees_nothing_more() -> None:
    done = jnp.array([False, True])
    rows = Rows(jnp.array([1, 2]), done, jnp.array([5, 5]), jnp.zeros((2, 9), bool), jnp.zeros(2))
    token, rows = record(jnp.array([4, 6]), rows, np.array([8, NO_TOKEN]), PENALISED)
    assert token.tolist() == [4, NO_TOKEN] and rows.remaining.tolist() == [4, 5]
    assert np.argwhere(rows.seen).tolist() == [[0, 4]]


def test_stop_ids_come_in_few_sizes() -> None:
    assert stop_ids_of((), 99).tolist() == [NO_TOKEN]
    assert stop_ids_of({7}, 99).tolist() == [7]
    assert stop_ids_of(np.array([7, 3, 7, 5]), 99).tolist() == [3, 5, 7, NO_TOKEN]
    assert {len(stop_ids_of(range(n), 99)) for n in range(40)} == {1, 2, 4, 8, 16, 32, 64}


def test_numbers_of_stop_ids_share_programs(omnis: Callable[[str], Omni]) -> None:
    omni = omnis("tiny")
    free = omni.generate(user("Hi"), max_new_tokens=9, stop_ids=()).token_ids
    at = next(i for i in range(2, 9) if free[i] not in free[:i])
    others = [i for i in range(200) if i not in free]
    omni.generate(user("Hi"), max_new_tokens=9, stop_ids=others[:4])
    before = prefill._cache_size(), decode_chunk._cache_size()
    for n in (3, 4):
        stopped = omni.generate(user("Hi"), max_new_tokens=9, stop_ids=[free[at], *others[: n - 1]])
        assert stopped.token_ids == free[: at + 1]
    assert (prefill._cache_size(), decode_chunk._cache_size()) == before


def test_seeds() -> None:
    assert seeds_of(5, 2) == [5, 5] and seeds_of(np.uint8(5), 2, 2) == [5, 6, 5, 6]
    assert seeds_of((1, 9), 2, 3) == [1, 2, 3, 9, 10, 11] == seeds_of(np.array([1, 9]), 2, 3)
    keys = jax.random.key_data(row_keys([5, 5, 6], 3))
    np.testing.assert_array_equal(keys[0], keys[1])
    assert (keys[0] != keys[2]).any()
    with pytest.raises(InputError, match="2 seeds for 3"):
        seeds_of([1, 2], 3)


def test_numbers_of_numpy_are_numbers(omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path]) -> None:
    omni, messages = omnis("tiny"), user("Hi")
    drafting = {"drafter": load_drafter(drafters("eagle3", "tiny")), "draft_tokens": np.int64(3)}
    numbers = {"top_k": np.int16(9), "temperature": np.float32(0.5), "seed": np.uint64(3), "logprobs": np.int8(2)}
    numbers |= {"max_new_tokens": np.int64(4), "stop_ids": np.array([7]), "top_p": np.float64(0.75)}
    plain = {"max_new_tokens": 4, "stop_ids": [7], "top_k": 9, "temperature": 0.5, "seed": 3, "top_p": 0.75}
    want = omni.generate(messages, **plain).token_ids
    assert omni.generate(messages, **numbers, **drafting).token_ids == want
    assert omni.generate(messages, **numbers, speech=np.bool_(False), draft_sampling=np.False_).token_ids == want
    ((_, many),) = omni.generate_many([messages], slots=np.int32(2), **numbers)
    assert many.token_ids == want and list(omni.stream(messages, **numbers))[-1].reply.token_ids == want
