"""Choosing the next token: penalty, temperature, top-k, top-p, min-p, then a draw that depends on the position alone.

Every draw uses `fold_in(row key, absolute position)`, so the same seed gives the same token whatever the batch, the
chunk size or the way in which the position was reached (plain or drafted). Order and meaning of the filters are those
of transformers' logits processors. Values are traced; only the kind of program (`Plan`) is static.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.values import number_of, shown, whole

# The finest temperature and share of mass: float32 logits of scale 10 differ by that much.
FINEST = 1e-6
# The most alternatives to a token whose log-probabilities can be reported.
MOST_LIKELY = 20


class Plan(NamedTuple):
    """What the compiled program contains: no draw at all, the penalty, and how many candidates are sorted (0: none).

    The number of candidates is a power of two or the whole vocabulary; traced values decide which of them count.
    likely: the number of likeliest tokens whose log-probabilities are given with the token's own; None for neither.
    """

    greedy: bool
    penalised: bool
    candidates: int
    likely: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.

    logprobs: how many alternatives to each token to report with log-probabilities; None for none, not even the token's.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        for name in names:
            object.__setattr__(self, name, number_of(name, getattr(self, name)))
        low, high = FINEST, 1 / FINEST
        checks = (
            (self.temperature == 0 or low <= self.temperature <= high, f"0 (greedy) or from {low:g} to {high:g}"),
            (0 <= self.top_k < 2**31 and self.top_k % 1 == 0, "0 (off) or a positive count"),
            (low <= self.top_p <= 1, f"from {low:g} to 1 (off)"),
            (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            (1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000, 1 is off"),
        )
        for name, (valid, expected) in zip(names, checks, strict=True):
            if not valid:
                raise InputError(f"{name} is {shown(getattr(self, name))}; it must be {expected}")
        if self.logprobs is not None:
            remedy = f"give the number of alternatives to report with each token, 0 to {MOST_LIKELY}, or None"
            object.__setattr__(self, "logprobs", whole("logprobs", self.logprobs, remedy, least=0, most=MOST_LIKELY))

    def plan(self, vocab_size: int) -> Plan:
        """The static part for a vocabulary of `vocab_size`."""
        greedy = self.temperature == 0.0
        filtered = self.top_p < 1.0 or self.min_p > 0.0
        candidates = vocab_size if filtered else 0
        if self.top_k:
            candidates = min(1 << (int(self.top_k) - 1).bit_length(), vocab_size)
        # One program for any number of alternatives.
        likely = self.logprobs and min(MOST_LIKELY, vocab_size)
        return Plan(greedy, self.repetition_penalty != 1.0, 0 if greedy else candidates, likely)

    def values(self) -> dict[str, np.number]:
        """The traced part."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        top_k = np.int32(self.top_k or np.iinfo(np.int32).max)
        return {"top_k": top_k, **{name: np.float32(getattr(self, name)) for name in names}}


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Divide positive and multiply negative logits [B, V] of tokens in `seen` bool [B, V] by `penalty`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(
    logits: jax.Array, keys: jax.Array, position: jax.Array, seen: jax.Array | None, values: dict, plan: Plan
) -> jax.Array:
    """Next token int32 [B] from float32 logits [B, V].

    keys: one typed key per row. position: int32 [B], of the token in its row. seen: bool [B, V] when
    the plan is penalised.
    """
    logits = filtered(logits, seen, values, plan)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32) if plan.greedy else draw_keyed(logits, keys, position)


def filtered(logits: jax.Array, seen: jax.Array | None, values: dict, plan: Plan) -> jax.Array:
    """The float32 logits [B, V] that a token is drawn from, unnormalised; -inf for tokens that cannot be drawn."""
    if seen is not None and plan.penalised:
        logits = penalise(logits, seen, values["repetition_penalty"])
    if plan.greedy:
        return logits
    logits = logits / values["temperature"]
    if not plan.candidates:
        return logits
    candidates = min(plan.candidates, logits.shape[-1])
    top, ids = jax.lax.top_k(logits, candidates)
    top = jnp.where(jnp.arange(candidates) < values["top_k"], top, -jnp.inf)
    kept = jnp.where(_keep(top, values["top_p"], values["min_p"]), top, -jnp.inf)
    # Over token ids, not ranks, so that near-ties that change places do not change a draw.
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


def _keep(top: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which of the descending logits [B, C] survive: the fewest of mass top_p, then those above min_p of the best."""
    probabilities = jax.nn.softmax(top, axis=-1)
    keep = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    probabilities = jnp.where(keep, probabilities, 0.0)
    return keep & (probabilities >= min_p * probabilities[:, :1])
