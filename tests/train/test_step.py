"""One step by its two programs."""

from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.train.objective import Loss
from omni_jax.train.optimizer import optimizer_of, schedule_of
from omni_jax.train.settings import Optimizer
from omni_jax.train.state import begin, shardings_of
from omni_jax.train.step import programs
from omni_jax.weights.trees import flatten, nest
from scripts.small.objective import ToyBatches, make_objective

NAN, MASKED = {"target": np.full((8, 4), np.nan, np.float32)}, {"mask": np.zeros((8, 4), bool)}


@pytest.mark.parametrize("broken, applied", [({}, True), (NAN, False), (MASKED, False)])
def test_a_step_that_cannot_be_taken_changes_nothing(broken: dict[str, Any], applied: bool) -> None:
    objective = make_objective()
    optimizer = optimizer_of(Optimizer(), 4, objective.axes)
    made = programs(objective, optimizer, schedule_of(Optimizer(), 4), shardings_of(objective, optimizer, None), None)
    batch = ToyBatches(broken={0: broken}).step(0).batch
    state = begin(objective, optimizer, None)
    before = jax.tree.map(np.array, state)
    state, sums, report = made.update(state, made.add(state.params, objective.frozen, batch, made.empty(batch)))
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), before, jax.tree.map(np.array, state))
    assert bool(report.applied) == applied and all(jax.tree.leaves(same)) != applied
    assert int(state.step) == applied and not any(np.any(x) for x in jax.tree.leaves(sums))


def test_steps_are_those_of_adamw_stated_naively() -> None:
    """Gradients of a mean over all batches, clipped by their norm; decay of all but norms; the rate of each step."""
    settings = Optimizer(learning_rate=0.03, warmup_ratio=0.5, beta1=0.8, beta2=0.9, weight_decay=0.4, clip_norm=0.2)
    objective, schedule = make_objective(), schedule_of(settings, 4)
    optimizer = optimizer_of(settings, 4, objective.axes)
    made = programs(objective, optimizer, schedule, shardings_of(objective, optimizer, None), None)
    state, batches = begin(objective, optimizer, None), ToyBatches()
    params = flatten(jax.tree.map(np.array, state.params))
    moments = [{path: np.zeros_like(x) for path, x in params.items()} for _ in range(2)]
    sums = made.empty(batches.step(0).batch)
    for step in range(3):
        pair = [batches.step(2 * step + i).batch for i in range(2)]
        whole = {name: np.concatenate([one[name] for one in pair]) for name in pair[0]}
        gradient = jax.grad(lambda p, whole=whole: _mean(objective.loss(p, objective.frozen, whole)))(nest(params))
        gradient = flatten(jax.tree.map(np.array, gradient))
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        rate = float(np.asarray(schedule(step)))
        for path, g in gradient.items():
            g = g * min(1, settings.clip_norm / norm)
            first, second = (m[path] for m in moments)
            first += (1 - settings.beta1) * (g - first)
            second += (1 - settings.beta2) * (g**2 - second)
            unbiased = (first / (1 - settings.beta1 ** (step + 1)), second / (1 - settings.beta2 ** (step + 1)))
            decay = 0 if "norm" in path else settings.weight_decay * params[path]
            params[path] = params[path] - rate * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + decay)
        for batch in pair:
            sums = made.add(state.params, objective.frozen, batch, sums)
        state, sums, report = made.update(state, sums)
        assert norm > settings.clip_norm and float(report.gradient_norm) == pytest.approx(norm, rel=1e-5)
        assert float(report.learning_rate) == pytest.approx(rate)
        for path, x in flatten(state.params).items():
            np.testing.assert_allclose(x, params[path], rtol=1e-4, atol=1e-5, err_msg=path)


def _mean(loss: Loss) -> jax.Array:
    return loss.total / loss.weight
