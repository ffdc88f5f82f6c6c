"""The two compiled programs of a step: the gradient of one batch, added to sums, and one update from the sums.

A step divides the sum of the gradients of all its batches by the sum of their weights, so batches may be of any size,
and two halves of a batch give the gradient of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax.train.objective import Loss, Objective
from omni_jax.train.state import TrainState, on_devices, whole_on

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the batches of a step: gradient, as the parameters, and a `Loss`."""

    gradient: Any
    loss: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Report:
    """What a step tells the host: its sums of the loss, and float32 [] gradient norm and learning rate.

    applied: bool [], False where loss or gradient is not finite, or nothing counts: then the state is unchanged.
    """

    loss: Loss
    gradient_norm: jax.Array
    learning_rate: jax.Array
    applied: jax.Array


@dataclass(frozen=True, eq=False)
class Programs:
    """The programs of a run, compiled at their first use for each size of batch.

    described(batch) -> sums for batches such as this one as shapes, dtypes and shardings; empty(batch) -> sums of
    nothing. add(params, frozen, batch, sums) -> sums.
    update(state, sums) -> state, sums of nothing and a `Report`. The last two work in the memory of what they change.
    """

    described: Callable[[Any], Sums]
    empty: Callable[[Any], Sums]
    add: Any
    update: Callable[[TrainState, Sums], tuple[TrainState, Sums, Report]]


def programs(
    objective: Objective,
    optimizer: "optax.GradientTransformation",
    schedule: "optax.Schedule",
    shardings: TrainState,
    mesh: Mesh | None,
) -> Programs:
    """The programs for an objective; shardings: of the state, which the sums of its gradients share."""
    whole = whole_on(mesh)

    def add(params: Any, frozen: Any, batch: Any, sums: Sums) -> Sums:
        def total(params: Any) -> tuple[jax.Array, Loss]:
            loss = objective.loss(params, frozen, batch)
            return loss.total, loss

        gradient, loss = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(jnp.add, sums, Sums(gradient, loss))

    def update(state: TrainState, sums: Sums) -> tuple[TrainState, Sums, Report]:
        return _update(optimizer, schedule, state, sums)

    def described(batch: Any) -> Sums:
        loss = jax.eval_shape(objective.loss, objective.params, objective.frozen, batch)
        return on_devices(Sums(objective.params, loss), Sums(shardings.params, jax.tree.map(lambda _: whole, loss)))

    def empty(batch: Any) -> Sums:
        return jax.jit(lambda: _zeros(described(batch)), out_shardings=on)()

    on = Sums(shardings.params, whole)
    return Programs(
        described,
        empty,
        jax.jit(add, donate_argnums=3, out_shardings=on),
        jax.jit(update, donate_argnums=(0, 1), out_shardings=(shardings, on, whole)),
    )


def _update(
    optimizer: "optax.GradientTransformation", schedule: "optax.Schedule", state: TrainState, sums: Sums
) -> tuple[TrainState, Sums, Report]:
    import optax

    weight = sums.loss.weight
    gradient = jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1), sums.gradient)
    norm = optax.tree.norm(gradient)
    applied = jnp.isfinite(sums.loss.total) & jnp.isfinite(norm) & (weight > 0)
    updates, kept = optimizer.update(gradient, state.optimizer, state.params)
    new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), kept)
    new = jax.tree.map(lambda after, before: jnp.where(applied, after, before), new, state)
    report = Report(sums.loss, norm, jnp.float32(schedule(state.step)), applied)
    return new, _zeros(sums), report


def _zeros(sums: Sums) -> Sums:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
