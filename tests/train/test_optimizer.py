"""The learning rate over a run, what decays, and where the state of the optimizer is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.sharding import make_mesh
from omni_jax.train.objective import masters
from omni_jax.train.optimizer import decays, optimizer_of, schedule_of
from omni_jax.train.settings import Optimizer
from omni_jax.train.state import begin, described
from scripts.small.objective import make_objective


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = schedule_of(Optimizer(learning_rate=2.0, warmup_ratio=0.1, final_ratio=0.25), 40)
    rates = [float(schedule(step)) for step in range(40)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    halfway = 4 + (39 - 4) / 2
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[39] == pytest.approx(0.5)
    assert float(schedule(halfway)) == pytest.approx(2 * (0.25 + 0.75 / 2))


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_a_run_of_one_step_has_a_learning_rate(warmup: float) -> None:
    assert float(schedule_of(Optimizer(learning_rate=2.0, warmup_ratio=warmup), 1)(0)) == pytest.approx(2.0)


def test_norms_and_biases_do_not_decay() -> None:
    x = jnp.ones((2, 3))
    params = {"layers": {"q_norm": {"weight": x}, "qkv": x}, "fc": {"bias": x, "weight": x}, "norm": {"weight": x}}
    off = {"layers": {"q_norm": {"weight": False}, "qkv": True}, "fc": {"bias": False, "weight": True}}
    assert decays(params) == off | {"norm": {"weight": False}}


def test_moments_are_split_as_their_parameters() -> None:
    optimizer, mesh = optimizer_of(Optimizer(), 10), make_mesh(jax.devices(), fsdp=2, expert=2, tensor=2)
    expected, state = described(make_objective(), optimizer, mesh), begin(make_objective(), optimizer, mesh)
    same = jax.tree.map(lambda x, on: x.sharding.is_equivalent_to(on.sharding, x.ndim), state, expected)
    assert all(jax.tree.leaves(same))
    shards = {str(x.sharding.spec) for x in jax.tree.leaves(state.optimizer) if x.ndim == 3}
    assert shards == {str(state.params["experts"].sharding.spec)} and "expert" in shards.pop()


def test_masters_are_copies() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}
    made = masters(params)
    jax.tree.map(lambda x: x.delete(), made)
    assert made["b"].dtype == jnp.float32 and float(params["a"].sum() + params["b"].sum()) == 6
