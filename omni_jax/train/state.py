"""What a step changes: its number, the parameters, and the state of the optimizer, and where each of them is.

Parameters are split by their logical axes as `sharding.RULES` say; what the optimizer keeps of a parameter is split as
the parameter is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from omni_jax.sharding import sharding_for
from omni_jax.train.objective import Objective

if TYPE_CHECKING:
    import optax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainState:
    """step: int32 [], how many steps were taken. params: float32 arrays. optimizer: the state of optax."""

    step: Any
    params: Any
    optimizer: Any


def begin(objective: Objective, optimizer: "optax.GradientTransformation", mesh: Mesh | None) -> TrainState:
    """The state before the first step, on the devices of `mesh`; it takes over the arrays of objective.params."""
    where = shardings_of(objective, optimizer, mesh)
    params = jax.tree.map(jax.device_put, objective.params, where.params)
    start = jax.jit(optimizer.init, out_shardings=where.optimizer)
    return TrainState(jax.device_put(jnp.int32(0), where.step), params, start(params))


def described(objective: Objective, optimizer: "optax.GradientTransformation", mesh: Mesh | None) -> TrainState:
    """The state as shapes, dtypes and shardings, for what restores it and for estimates of memory."""
    abstract = jax.eval_shape(lambda params: _state(params, optimizer), objective.params)
    return on_devices(abstract, shardings_of(objective, optimizer, mesh))


def shardings_of(objective: Objective, optimizer: "optax.GradientTransformation", mesh: Mesh | None) -> TrainState:
    """A sharding for each array of the state: what is kept of a parameter ends with the parameter's path."""
    whole, params = whole_on(mesh), leaf_shardings(objective.params, objective.axes, mesh)
    placed = dict(jax.tree_util.tree_leaves_with_path(params))

    def where(path: tuple, _: Any) -> Sharding:
        return next((placed[path[i:]] for i in range(len(path)) if path[i:] in placed), whole)

    abstract = jax.eval_shape(optimizer.init, objective.params)
    return TrainState(whole, params, jax.tree_util.tree_map_with_path(where, abstract))


def leaf_shardings(arrays: Any, axes: Any, mesh: Mesh | None) -> Any:
    """A sharding for each array of a pytree by its logical axes, whole along those that the mesh does not divide."""
    if mesh is None:
        return jax.tree.map(lambda _: whole_on(None), arrays)
    return jax.tree.map(lambda x, names: sharding_for(names, x.shape, mesh), arrays, axes)


def on_devices(arrays: Any, shardings: Any) -> Any:
    """Arrays as shapes and dtypes with these shardings."""
    return jax.tree.map(lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), arrays, shardings)


def whole_on(mesh: Mesh | None) -> Sharding:
    """An array that each device of `mesh` holds whole; without a mesh, the first device of this process."""
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())


def _state(params: Any, optimizer: "optax.GradientTransformation") -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer.init(params))
