"""AdamW with linear warmup and a cosine, and gradients clipped by their norm. Source: optax."""

from typing import TYPE_CHECKING, Any

import jax

from omni_jax.train.settings import Optimizer

if TYPE_CHECKING:
    import optax


def schedule_of(settings: Optimizer, steps: int) -> "optax.Schedule":
    """The learning rate of each of `steps` steps, float32 [] of a count int32 [].

    The first step of a warmup already moves: it has the share 1 / n of the highest rate, where n steps warm up.
    """
    import optax

    warmup = min(round(settings.warmup_ratio * steps), steps - 1)
    highest = settings.learning_rate
    rise = optax.linear_schedule(highest / (warmup + 1), highest, warmup)
    fall = optax.cosine_decay_schedule(highest, max(1, steps - 1 - warmup), settings.final_ratio)
    return optax.join_schedules([rise, fall], [warmup])


def optimizer_of(settings: Optimizer, steps: int) -> "optax.GradientTransformation":
    """The optimizer of a run of `steps` steps; its state has a float32 array for each moment of each parameter."""
    import optax

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            schedule_of(settings, steps),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=decays,
        ),
    )


def decays(params: Any) -> Any:
    """A tree of bools: whether each parameter decays, which all do but biases and the weights of norms."""

    def one(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return names[-1] != "bias" and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(one, params)
