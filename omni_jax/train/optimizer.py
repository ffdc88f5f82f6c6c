"""AdamW or Muon with linear warmup and a cosine, and gradients clipped by their norm. Source: optax."""

from typing import TYPE_CHECKING, Any

import jax

from omni_jax.sharding import Axes
from omni_jax.train.settings import Optimizer

if TYPE_CHECKING:
    import optax

# Root mean square of Muon's steps, relative to the learning rate: with it both take the same rates (arXiv 2502.16982).
MUON_RMS = 0.2


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


def optimizer_of(settings: Optimizer, steps: int, axes: Any) -> "optax.GradientTransformation":
    """The optimizer of a run of `steps` steps for parameters with logical axes `axes`, a tree of the same structure.

    Its state has a float32 array for each moment of each parameter: two with AdamW, one of each matrix with Muon.
    Muon's momentum is Nesterov's, also where AdamW moves what is no matrix.
    """
    import optax

    rate = schedule_of(settings, steps)
    scaled = (
        optax.contrib.muon(
            # The sign of a step comes with its learning rate, after the decay.
            learning_rate=-1.0,
            beta=settings.beta1,
            adam_b1=settings.beta1,
            adam_b2=settings.beta2,
            muon_weight_dimension_numbers=matrices(axes),
            consistent_rms=MUON_RMS,
        )
        if settings.optimizer == "muon"
        else optax.scale_by_adam(b1=settings.beta1, b2=settings.beta2)
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        scaled,
        optax.add_decayed_weights(settings.weight_decay, decays),
        optax.scale_by_learning_rate(rate),
    )


def matrices(axes: Any) -> Any:
    """The matrices that Muon makes orthogonal, in a tree like `axes`; None for a parameter that AdamW trains.

    The width of the model is one side of a matrix, without one the first axis; all others but those of layers and
    experts are the other side. Vectors, biases, norms, embeddings and heads over a vocabulary are AdamW's.
    """
    from optax.contrib import MuonDimensionNumbers

    def one(path: tuple, names: Axes) -> MuonDimensionNumbers | None:
        sides = [i for i, name in enumerate(names) if name not in ("layers", "expert")]
        if len(sides) < 2 or "vocab" in names or str(path[-1].key) in ("bias", "pos_embed"):
            return None
        width = names.index("embed") if "embed" in names else sides[0]
        return MuonDimensionNumbers(reduction_axis=width, output_axis=[i for i in sides if i != width])

    return jax.tree_util.tree_map_with_path(one, axes, is_leaf=lambda x: isinstance(x, tuple))


def decays(params: Any) -> Any:
    """A tree of bools: whether each parameter decays, which all do but biases and the weights of norms."""

    def one(path: tuple, _: Any) -> bool:
        names = [str(getattr(key, "key", key)) for key in path]
        return names[-1] != "bias" and not any(name.endswith("norm") for name in names)

    return jax.tree_util.tree_map_with_path(one, params)
