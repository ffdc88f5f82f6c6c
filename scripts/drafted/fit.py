"""A plain training loop for the small models of this proof: AdamW, cosine with warmup, and a file to go on from."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.train.objective import Loss
from scripts.stored_state import restored, save

SAVE_SECONDS = 60


def fit(
    params: Any,
    frozen: Any,
    loss: Callable[[Any, Any, Any], Loss],
    batch_of: Callable[[int], Any],
    seconds: float,
    steps: int,
    rate: float,
    clip: float,
    file: Path,
) -> Any:
    """Train `params` for at most `steps` steps and `seconds` in all, going on from `file`: the trained params.

    loss: a pure function of params, frozen and a batch. batch_of: the batch of a step. rate: the highest learning rate.
    The loss and the metrics of some steps are printed.
    """
    import optax

    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 25), steps, rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=0.01))
    state = (params, optimizer.init(params))
    state, begin, spent = restored(file, state)

    @jax.jit
    def step(state: Any, frozen: Any, batch: Any) -> tuple[Any, dict]:
        def mean(params: Any) -> tuple[jax.Array, Loss]:
            made = loss(params, frozen, batch)
            return made.total / jnp.maximum(made.weight, 1e-9), made

        params, memory = state
        (value, made), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        updates, memory = optimizer.update(gradient, memory, params)
        shown = {name: x / jnp.maximum(made.weight, 1e-9) for name, x in made.metrics.items()}
        return (optax.apply_updates(params, updates), memory), {"loss": value, **shown}

    saved = started = time.monotonic()
    for number in range(begin, steps):
        state, shown = jax.block_until_ready(step(state, frozen, batch_of(number)))
        now = time.monotonic()
        if number % 25 == 0 or number == steps - 1:
            values = ", ".join(f"{name} {float(x):.3f}" for name, x in shown.items())
            print(f"step {number}: {values} ({spent + now - started:.0f} s)", flush=True)
        if now - saved > SAVE_SECONDS or spent + now - started > seconds or number == steps - 1:
            save(file, state, number + 1, spent + now - started)
            saved = now
        if spent + now - started > seconds:
            break
    return state[0]
