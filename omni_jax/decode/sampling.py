"""Choosing the next token: penalty, temperature, top-k, top-p, min-p, then a draw that depends on the position alone.

Every draw uses `fold_in(row key, absolute position)`, so the same seed gives the same token whatever the batch, the
chunk size or the way in which the position was reached (plain or drafted). Order and meaning of the filters are those
of transformers' logits processors. Values are traced; only the kind of program (`Plan`) is static. They are numbers for
all rows, or arrays [B, 1] of each; a greedy row beside rows that draw has a top_k of 1.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.ops.top_k import top_k
from omni_jax.settings import Plan as Plan
from omni_jax.settings import Sampling as Sampling


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divide positive and multiply negative logits [B, V] of tokens in `seen` bool [B, V] by `penalty`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def values_by_row(samplings: Sequence[Sampling]) -> dict[str, np.ndarray]:
    """Sampling values by name, each [B, 1]. In a program that draws, a greedy row draws from its likeliest token."""
    rows = [
        (replace(one, temperature=1.0, top_k=1, top_p=1.0, min_p=0.0) if one.temperature == 0 else one).values()
        for one in samplings
    ]
    return {name: np.stack([row[name] for row in rows])[:, None] for name in rows[0]}


@jax.named_scope("sample")
def sample(
    logits: jax.Array, keys: jax.Array, position: jax.Array, seen: jax.Array | None, values: dict, plan: Plan
) -> jax.Array:
    """Next token int32 [B] from float32 logits [B, V].

    keys: one typed key per row. position: int32 [B], of the token in its row. seen: bool [B, V] when
    the plan is penalised.
    """
    logits = _tempered(logits, seen, values, plan)
    if plan.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not plan.candidates:
        return draw_keyed(_kept_whole(logits, values, plan), keys, position)
    # As `draw_keyed` over the whole vocabulary, without noise for tokens that cannot be drawn.
    kept, ids = _candidates(logits, values, plan)
    chosen = jnp.argmax(kept + jax.vmap(_noise_of)(jax.vmap(fold)(keys, position), ids), axis=-1)
    return jnp.take_along_axis(ids, chosen[:, None], axis=-1)[:, 0]


def filtered(logits: jax.Array, seen: jax.Array | None, values: dict, plan: Plan) -> jax.Array:
    """The float32 logits [B, V] that a token is drawn from, unnormalised; -inf for tokens that cannot be drawn."""
    logits = _tempered(logits, seen, values, plan)
    if not plan.candidates:
        return _kept_whole(logits, values, plan)
    kept, ids = _candidates(logits, values, plan)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.full_like(logits, -jnp.inf).at[rows, ids].set(kept)


def draw_keyed(logits: jax.Array, keys: jax.Array, position: jax.Array, *more: int) -> jax.Array:
    """Tokens int32 [B] from logits [B, V], each with its row's key, its position int32 [B] and more numbers."""

    def one(key: jax.Array, at: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(fold(key, at, *more), row)

    return jax.vmap(one)(keys, position, logits).astype(jnp.int32)


def fold(key: jax.Array, *numbers: jax.Array | int) -> jax.Array:
    """The key that belongs to a typed key [] and `numbers`, int32 []."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def _tempered(logits: jax.Array, seen: jax.Array | None, values: dict, plan: Plan) -> jax.Array:
    """Logits float32 [B, V], penalised where the plan says so and, unless it is greedy, divided by the temperature."""
    if seen is not None and plan.penalised:
        logits = penalise(logits, seen, values["repetition_penalty"])
    return logits if plan.greedy else logits / values["temperature"]


def _kept_whole(logits: jax.Array, values: dict, plan: Plan) -> jax.Array:
    """Logits [B, V] that are drawn from without candidates: all, of greedy rows beside others the likeliest alone."""
    if not plan.some_greedy:
        return logits
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where((values["top_k"] == 1) & (jnp.arange(logits.shape[-1]) != best), -jnp.inf, logits)


def _candidates(logits: jax.Array, values: dict, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The C likeliest tokens of logits [B, V]: their logits [B, C], -inf where filtered out, and ids int32 [B, C]."""
    candidates = min(plan.candidates, logits.shape[-1])
    top, ids = top_k(logits, candidates)
    top = jnp.where(jnp.arange(candidates) < values["top_k"], top, -jnp.inf)
    return jnp.where(_keep(top, values["top_p"], values["min_p"]), top, -jnp.inf), ids


def _noise_of(key: jax.Array, ids: jax.Array) -> jax.Array:
    """The elements `ids` (int32 [C]) of `jax.random.gumbel(key)` over a vocabulary, float32 [C].

    A token's noise depends on its id, not on its rank, so that near-ties that change places do not change a draw. With
    `jax_threefry_partitionable`, JAX's default, element i is made of the two words of `fold_in(key, i)`.
    """
    words = jax.random.key_data(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids))
    bits = words[:, 0] ^ words[:, 1]
    smallest = jnp.finfo(jnp.float32).tiny
    # Random bits after the exponent of 1: a number from 1 to 2.
    uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform * (1 - smallest) + smallest, smallest)))


def _keep(top: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which of the descending logits [B, C] survive: the fewest of mass top_p, then those above min_p of the best."""
    probabilities = jax.nn.softmax(top, axis=-1)
    keep = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    probabilities = jnp.where(keep, probabilities, 0.0)
    return keep & (probabilities >= min_p * probabilities[:, :1])
