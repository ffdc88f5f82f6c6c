"""An oracle drafter: it knows the reply and drafts it with a chosen error rate, to test and measure the loop itself."""

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
    """Drafts from a known reply. params: ids int32 and lie bool [B, N] of the reply, length int32 [B] of the prompts.

    Where `lie` is true it drafts another token; after the end of the reply it repeats the last one.
    """

    taps: tuple[int, ...] = (1,)
    default_tokens: int = 15
    max_tokens: int = 64

    def empty(self, params: dict, rows: int, capacity: int, dtype: Any) -> jax.Array:
        """Its memory: the number of tokens that each row has read, int32 [B]."""
        return jnp.zeros((rows,), jnp.int32)

    def grow(self, memory: jax.Array, capacity: int) -> jax.Array:
        """`memory` int32 [B] unchanged: it does not depend on the cache's size."""
        return memory

    def remember(self, params: dict, thinker: Thinker, memory: jax.Array, seen: Seen) -> jax.Array:
        """`memory` int32 [B] plus the tokens that each row has read since."""
        return memory + seen.count

    def max_emitted(self, verify_tokens: int) -> int:
        """The most tokens that a round gives: its drafts, and one of the target's own."""
        return verify_tokens

    def slots_written(self, verify_tokens: int) -> int:
        """The cache positions that a round writes."""
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
        """A chain of nodes after token int32 [B]: the known tokens, or wrong ones; and the same memory."""
        at = (memory - params["length"])[:, None] + 1 + jnp.arange(verify_tokens - 1)
        at = jnp.minimum(at, params["ids"].shape[1] - 1)
        drafts, lies = (jnp.take_along_axis(params[name], at, axis=1) for name in ("ids", "lie"))
        return DraftTree.chain(token, jnp.where(lies, (drafts + 1) % thinker.embed.shape[0], drafts)), memory


# One object for all uses, because compiled programs are cached by drafter.
ORACLE = Oracle()


def oracle(known: Sequence[Request], verify_tokens: int, lies: float = 0.0) -> DraftPlan:
    """Draft the replies of finished requests, `verify_tokens` per round, with an error rate `lies` from 0 to 1."""
    ids = np.zeros((len(known), max(len(request.token_ids) for request in known)), np.int32)
    for row, request in zip(ids, known, strict=True):
        row[: len(request.token_ids)] = request.token_ids
    lie = np.random.default_rng(0).random(ids.shape) < lies
    length = jnp.asarray([request.prompt_tokens for request in known], jnp.int32)
    return DraftPlan(ORACLE, {"ids": jnp.asarray(ids), "lie": jnp.asarray(lie), "length": length}, (verify_tokens,))
