"""The learning rate over a run, what decays, and where the state of the optimizer is."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from omni_jax.sharding import make_mesh
from omni_jax.train.objective import masters
from omni_jax.train.optimizer import MUON_RMS, decays, matrices, optimizer_of, schedule_of
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_split_as_their_parameters(name: Literal["adamw", "muon"]) -> None:
    optimizer = optimizer_of(Optimizer(optimizer=name), 10, make_objective().axes)
    mesh = make_mesh(jax.devices(), fsdp=2, expert=2, tensor=2)
    expected, state = described(make_objective(), optimizer, mesh), begin(make_objective(), optimizer, mesh)
    same = jax.tree.map(lambda x, on: x.sharding.is_equivalent_to(on.sharding, x.ndim), state, expected)
    assert all(jax.tree.leaves(same))
    shards = {str(x.sharding.spec) for x in jax.tree.leaves(state.optimizer) if x.ndim == 3}
    assert shards == {str(state.params["experts"].sharding.spec)} and "expert" in shards.pop()


def test_the_matrices_of_muon() -> None:
    """Their sides by logical axes; what has one side, or a vocabulary, is left to AdamW."""
    axes = {
        "qkv": ("layers", "kv_heads", None, "head_dim", "embed"),
        "down": ("layers", "expert", "mlp", "embed"),
        "conv": {"weight": (None, None, None, None), "bias": (None,)},
        "fc": {"weight": ("layers", "embed", "mlp"), "bias": ("layers", None, "heads")},
        "embed": ("vocab", "embed"), "pos_embed": (None, "embed"), "gate": ("layers", "embed"),
    }  # fmt: skip
    found = matrices(axes)
    sides = {name: (one.reduction_axis, one.output_axis) for name, one in found.items() if isinstance(one, tuple)}
    assert sides == {"qkv": (4, [1, 2, 3]), "down": (3, [2])}
    assert found["conv"] == {"weight": MuonDimensionNumbers(0, [1, 2, 3]), "bias": None}
    assert found["fc"] == {"weight": MuonDimensionNumbers(1, [2]), "bias": None}
    assert found["embed"] is found["pos_embed"] is found["gate"] is None


def test_a_step_of_muon_is_orthogonal_and_as_large_as_one_of_adamw() -> None:
    """Every singular value is about the same, whatever those of the gradient are; vectors move as Nesterov's AdamW."""
    settings = Optimizer(optimizer="muon", learning_rate=0.1, warmup_ratio=0, weight_decay=0.5)
    axes = {"layers": ("layers", "mlp", "embed"), "norm": {"weight": ("embed",)}}
    params = {"layers": jnp.zeros((2, 12, 8)), "norm": {"weight": jnp.ones(8)}}
    draw = np.random.default_rng(0)
    gradient = {
        "layers": jnp.asarray(draw.standard_normal((2, 12, 8)) * [1.0, 10, 0.3, 1, 1, 4, 1, 1]),
        "norm": {"weight": jnp.asarray(draw.standard_normal(8))},
    }
    made = optimizer_of(settings, 10, axes)
    step, state = made.update(gradient, made.init(params), params)
    values = np.linalg.svd(np.asarray(step["layers"]), compute_uv=False) / (0.1 * MUON_RMS * 12**0.5)
    assert (values > 0.6).all() and (values < 1.3).all()
    adam = optax.nadamw(0.1, b1=settings.beta1, b2=settings.beta2, weight_decay=0)
    expected, _ = adam.update(gradient["norm"], adam.init(params["norm"]), params["norm"])
    np.testing.assert_allclose(step["norm"]["weight"], expected["weight"], rtol=1e-5)
    # Matrices decay, norms do not.
    decayed, _ = made.update(gradient, made.init(params), params | {"layers": params["layers"] + 1})
    np.testing.assert_allclose(decayed["layers"] - step["layers"], -0.1 * 0.5, rtol=1e-4)
    # One moment of the matrices, two of the vector.
    assert sorted(x.size for x in jax.tree.leaves(state) if x.ndim and x.shape[-1] == 8) == [8, 8, 192]


def test_masters_are_copies() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(3, jnp.bfloat16)}
    made = masters(params)
    jax.tree.map(lambda x: x.delete(), made)
    assert made["b"].dtype == jnp.float32 and float(params["a"].sum() + params["b"].sum()) == 6
