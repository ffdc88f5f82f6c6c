"""Results of stages are not gone on with when what they were made from has changed."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.errors import InputError
from scripts.stored_state import restored, save


def test_a_state_of_other_arrays_is_refused(tmp_path: Path) -> None:
    file, state = tmp_path / "state.npz", {"a": jnp.ones((2, 3)), "b": jnp.zeros(2, jnp.int32)}
    save(file, state, 7, 1.5)
    again, step, spent = restored(file, {"a": jnp.zeros((2, 3)), "b": jnp.ones(2, jnp.int32)})
    assert (step, spent) == (7, 1.5) and again["b"].dtype == jnp.int32
    np.testing.assert_array_equal(again["a"], state["a"])
    with pytest.raises(InputError, match=r"float32 of shape \(2, 3\) where float32 of shape \(3, 2\) is wanted"):
        restored(file, {"a": jnp.zeros((3, 2)), "b": state["b"]})
    with pytest.raises(InputError, match="holds 2 arrays, not 1; delete it"):
        restored(file, {"a": state["a"]})
    with pytest.raises(InputError, match="int32 of shape"):
        restored(file, {"a": state["a"], "b": jnp.zeros(2)})
