"""One step by its two programs."""

from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.train.optimizer import optimizer_of, schedule_of
from omni_jax.train.settings import Optimizer
from omni_jax.train.state import begin, shardings_of
from omni_jax.train.step import programs
from scripts.small.objective import ToyBatches, make_objective

NAN, MASKED = {"target": np.full((8, 4), np.nan, np.float32)}, {"mask": np.zeros((8, 4), bool)}


@pytest.mark.parametrize("broken, applied", [({}, True), (NAN, False), (MASKED, False)])
def test_a_step_that_cannot_be_taken_changes_nothing(broken: dict[str, Any], applied: bool) -> None:
    objective, optimizer = make_objective(), optimizer_of(Optimizer(), 4)
    made = programs(objective, optimizer, schedule_of(Optimizer(), 4), shardings_of(objective, optimizer, None), None)
    batch = ToyBatches(broken={0: broken}).step(0).batch
    state = begin(objective, optimizer, None)
    before = jax.tree.map(np.array, state)
    state, sums, report = made.update(state, made.add(state.params, objective.frozen, batch, made.empty(batch)))
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), before, jax.tree.map(np.array, state))
    assert bool(report.applied) == applied and all(jax.tree.leaves(same)) != applied
    assert int(state.step) == applied and not any(np.any(x) for x in jax.tree.leaves(sums))
