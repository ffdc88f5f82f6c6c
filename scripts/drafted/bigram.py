"""A bigram drafter, the least that a drafter must beat: after each token, the one that follows it most often."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decode.draft.loop import Seen
from omni_jax.decode.draft.plan import DraftPlan
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.models.thinker import Thinker


@dataclass(frozen=True, eq=False)
class Bigram:
    """Drafts by a table. params: int32 [V], the likeliest token after each. It remembers nothing."""

    taps: tuple[int, ...] = (1,)
    default_tokens: int = 7
    max_tokens: int = 64

    def empty(self, params: jax.Array, rows: int, capacity: int, dtype: Any) -> jax.Array:
        """An empty memory, float32 [0]."""
        return jnp.zeros((0,))

    def grow(self, memory: jax.Array, capacity: int) -> jax.Array:
        """The same memory [B]."""
        return memory

    def remember(self, params: jax.Array, thinker: Thinker, memory: jax.Array, seen: Seen) -> jax.Array:
        """The same memory [B]."""
        return memory

    def max_emitted(self, verify_tokens: int) -> int:
        """The most tokens that a round gives: its drafts, and one of the target's own."""
        return verify_tokens

    def slots_written(self, verify_tokens: int) -> int:
        """The cache positions that a round writes."""
        return verify_tokens

    def propose(
        self, params: jax.Array, thinker: Thinker, memory: jax.Array, token: jax.Array, verify_tokens: int,
        choose: DraftSampler,
    ) -> tuple[DraftTree, jax.Array]:  # fmt: skip
        """A chain of nodes after token int32 [B], and the same memory."""
        drafts = [params[token]]
        while len(drafts) < verify_tokens - 1:
            drafts.append(params[drafts[-1]])
        return DraftTree.chain(token, jnp.stack(drafts, axis=1)), memory


def bigram(replies: Iterable[list[int]], vocab_size: int, verify_tokens: int) -> DraftPlan:
    """Draft as the tokens of these replies follow each other."""
    counts = np.zeros((vocab_size, vocab_size), np.int64)
    for ids in replies:
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    return DraftPlan(Bigram(), jnp.asarray(counts.argmax(axis=1), jnp.int32), (verify_tokens,))
