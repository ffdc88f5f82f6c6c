"""A small objective, its recipe and its batches, for the training loop; a mesh splits its arrays."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.train.objective import Loss, Objective, Step
from omni_jax.train.settings import Compute, Optimizer, Recipe, Run
from omni_jax.weights.publish import publish

AXES = {"table": ("vocab", "embed"), "experts": ("expert", "embed", "mlp"), "norm": {"weight": ("embed",)}}


@dataclass(frozen=True, kw_only=True)
class Toy(Recipe):
    """Fit a table."""

    NAME = "toy"

    width: int = 8
    """Columns of the table."""


def recipe_for(output: Path, steps: int | None = 12, save_every: int = 5, log_every: int = 2, **optimizer: Any) -> Toy:
    """Settings of a run of seconds."""
    run = Run(
        model=Path("m"), data=(Path("d"),), output=output, steps=steps, save_every=save_every, log_every=log_every
    )
    settings = {"learning_rate": 0.05, **optimizer}
    return Toy(run=run, optimizer=Optimizer(**settings), compute=Compute(dtype="float32"))


def make_objective(width: int = 8) -> Objective:
    """What is trained: a table, an array of experts and a norm, from random numbers."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "table": jax.random.normal(keys[0], (16, width)),
        "experts": jax.random.normal(keys[1], (4, width, 8)) / 3,
        "norm": {"weight": jnp.ones(width)},
    }
    frozen = {"head": jax.random.normal(keys[2], (8,))}
    return Objective(params, frozen, AXES, loss, save)


def loss(params: Any, frozen: Any, batch: dict) -> Loss:
    """Squares over the rows [B, T] that are not masked."""
    x = params["table"][batch["ids"]] * params["norm"]["weight"]
    y = jnp.einsum("btd,edf,f->bt", jnp.tanh(x), params["experts"], frozen["head"])
    off = jnp.where(batch["mask"], jnp.square(y - batch["target"]), 0)
    counted = jnp.sum(batch["mask"], dtype=jnp.float32)
    return Loss(jnp.sum(off), counted, {"far": jnp.sum(off > 1, dtype=jnp.float32)})


def save(params: Any, directory: Path) -> None:
    """Write the parameters, each as the bytes of its array."""
    with publish(directory) as partial:
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            (partial / jax.tree_util.keystr(path, simple=True, separator=".")).write_bytes(np.asarray(x).tobytes())


@dataclass
class ToyBatches:
    """Batches of one size, `count` in an epoch; `broken` gives what to change of some of them by number."""

    rows: int = 8
    count: int = 6
    epochs: int | None = None
    broken: dict[int, dict[str, Any]] = field(default_factory=dict)
    position: int = 0

    @property
    def steps(self) -> int | None:
        return None if self.epochs is None and self.count else self.count * (self.epochs or 0)

    @property
    def epoch(self) -> int:
        return self.position // self.count

    def __iter__(self) -> Iterator[Step]:
        while self.epochs is None or self.position < self.epochs * self.count:
            self.position += 1
            yield self.step(self.position - 1)

    def step(self, number: int) -> Step:
        """A batch by its number."""
        draw = np.random.default_rng(number % self.count)
        ids = draw.integers(0, 16, (self.rows, 4), np.int32)
        batch = {"ids": ids, "target": np.sin(ids).astype(np.float32), "mask": draw.random(ids.shape) < 0.7}
        return Step(batch | self.broken.get(number, {}), [f"d:{number + 1}"], int(batch["mask"].sum()))

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
