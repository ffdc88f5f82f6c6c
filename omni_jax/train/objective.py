"""What a recipe gives to the loop: parameters to train, their loss, and how to write what users load."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from omni_jax.config import DecoderConfig
from omni_jax.errors import InputError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """Sums over what counts in a batch; a gradient step divides them by the weights of all its batches.

    total and weight: float32 []. metrics: further sums by name, float32 [], shown divided by the weight.
    """

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Objective:
    """What is trained.

    params: a pytree of float32 arrays that are trained; the loop takes them over and changes them, see `masters`.
    frozen: a pytree of arrays that the loss only reads. axes: the logical axes of each of the params, in a tree of the
    same form. loss: a pure function of params, frozen and a batch. save: writes what users load, made from trained
    params, into a new directory.
    """

    params: Any
    frozen: Any
    axes: Any
    loss: Callable[[Any, Any, Any], Loss]
    save: Callable[[Any, Path], None]


@dataclass(frozen=True, eq=False)
class Step:
    """A batch, as the loss takes it, the rows of data in it as "file:line", and its tokens, without padding."""

    batch: Any
    samples: list[str]
    tokens: int


class Batches(Protocol):
    """Batches of the data, which follow from the data and a seed alone."""

    @property
    def steps(self) -> int | None:
        """The number of batches of all epochs, None where these have no end."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the batch that comes next."""
        ...

    def __iter__(self) -> Iterator[Step]:
        """The batches that are left, from the present position on."""
        ...

    def state(self) -> dict[str, Any]:
        """The position of the batch that comes next, as values of JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position; InputError if it is one in other data."""
        ...


def check_trainable(text: DecoderConfig) -> None:
    """InputError for a text model whose experts are in eight bits, which have no gradient."""
    if text.int8_experts:
        raise InputError("experts in eight bits cannot be trained; train the model they come from, then quantise it")


def masters(params: Any) -> Any:
    """Copies of the arrays of a pytree in float32, for `Objective.params`."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def cast(params: Any, dtype: Any) -> Any:
    """The floating-point arrays of a pytree in `dtype`, others as they are."""
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)
