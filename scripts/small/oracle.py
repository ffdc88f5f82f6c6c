"""A drafter that knows what the target will say, and may be told to lie: to test and to measure the loop itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decode.draft.loop import Seen
from omni_jax.decode.draft.plan import DraftPlan
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.decode.request import Request
from omni_jax.models.thinker import Thinker


@dataclass(frozen=True, eq=False)
class Oracle:
    """Drafts from a reply that is known. params: its ids int32 and lie bool [B, N], and the prompts' length int32 [B].

    Where `lie` is true it drafts another token; behind the reply it repeats the last one.
    """

    taps: tuple[int, ...] = (1,)
    default_tokens: int = 15
    max_tokens: int = 64

    def empty(self, params: dict, rows: int, capacity: int, dtype: Any) -> jax.Array:
        """Its memory: how many tokens each row has read."""
        return jnp.zeros((rows,), jnp.int32)

    def grow(self, memory: jax.Array, capacity: int) -> jax.Array:
        """The same."""
        return memory

    def remember(self, params: dict, thinker: Thinker, memory: jax.Array, seen: Seen) -> jax.Array:
        """Count what was read."""
        return memory + seen.count

    def max_emitted(self, verify_tokens: int) -> int:
        """As many as it drafts, and one."""
        return verify_tokens

    def slots_written(self, verify_tokens: int) -> int:
        """The same."""
        return verify_tokens

    def propose(
        self,
        params: dict,
        thinker: Thinker,
        memory: jax.Array,
        token: jax.Array,
        verify_tokens: int,
        choose: DraftSampler,
    ) -> tuple[DraftTree, jax.Array]:
        """The tokens that follow, or lies."""
        at = (memory - params["length"])[:, None] + 1 + jnp.arange(verify_tokens - 1)
        at = jnp.minimum(at, params["ids"].shape[1] - 1)
        drafts, lies = (jnp.take_along_axis(params[name], at, axis=1) for name in ("ids", "lie"))
        return DraftTree.chain(token, jnp.where(lies, (drafts + 1) % thinker.embed.shape[0], drafts)), memory


# One for all, because what is compiled is kept by drafter.
ORACLE = Oracle()


def oracle(said: Sequence[Request], verify_tokens: int, lies: float = 0.0) -> DraftPlan:
    """Draft what finished requests said, verifying `verify_tokens` per round, of which a fraction `lies` is wrong."""
    ids = np.zeros((len(said), max(len(request.token_ids) for request in said)), np.int32)
    for row, request in zip(ids, said, strict=True):
        row[: len(request.token_ids)] = request.token_ids
    lie = np.random.default_rng(0).random(ids.shape) < lies
    length = jnp.asarray([request.prompt_tokens for request in said], jnp.int32)
    return DraftPlan(ORACLE, {"ids": jnp.asarray(ids), "lie": jnp.asarray(lie), "length": length}, (verify_tokens,))
