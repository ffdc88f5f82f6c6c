"""How DFlash takes part in a round: it drafts a whole block of tokens in one forward.

Unless drafts are drawn, the block is greedy, whatever the request's temperature: a draft is accepted where it equals
the token that the target draws, and the likeliest token equals that most often.

Source: z-lab's `spec_generate`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.decode.draft.loop import Seen
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.models.dflash import DFlash
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Thinker
from omni_jax.ops.cache import KVCache


@dataclass(frozen=True, eq=False)
class BlockProposer:
    """DFlash: remembers keys and values of every token, drafts a block of masks at once.

    taps: numbers of the hidden states that it reads. default_tokens, max_tokens: drafted per round, unless the request
    says another number, and at most.
    """

    declaration: Declaration
    taps: tuple[int, ...]
    default_tokens: int
    max_tokens: int

    def empty(self, params: dict, rows: int, capacity: int, dtype: Any) -> KVCache:
        """The memory of `rows` rows that have read nothing: a cache of `capacity` positions."""
        drafter: DFlash = bind(self.declaration, params)
        return drafter.empty(rows, capacity, dtype)

    def grow(self, memory: KVCache, capacity: int) -> KVCache:
        """The same memory with `capacity` positions, outside `jit`."""
        return memory.grow(capacity)

    def max_emitted(self, verify_tokens: int) -> int:
        """All drafts accepted, and one token of the target's own."""
        return verify_tokens

    def slots_written(self, verify_tokens: int) -> int:
        """The current token and its drafts."""
        return verify_tokens

    def remember(self, params: dict, thinker: Thinker, memory: KVCache, seen: Seen) -> KVCache:
        """The memory once it has read the tokens of `seen` too."""
        drafter: DFlash = bind(self.declaration, params)
        return drafter.remember(memory, drafter.fuse(seen.features), seen.count)

    def propose(
        self,
        params: dict,
        thinker: Thinker,
        memory: KVCache,
        token: jax.Array,
        verify_tokens: int,
        choose: DraftSampler,
    ) -> tuple[DraftTree, KVCache]:
        """A chain after the current token int32 [B], `verify_tokens` nodes with it; the memory keeps its lengths."""
        drafter: DFlash = bind(self.declaration, params)
        drafted = verify_tokens - 1
        masks = jnp.full((token.shape[0], drafted), drafter.config.mask_token_id, jnp.int32)
        block = thinker.embed_tokens(jnp.concatenate([token[:, None], masks], axis=1))
        hidden, memory = drafter.draft(block, memory)
        logits = thinker.logits(hidden[:, 1:])
        drafts, drawn_from = jax.vmap(choose, in_axes=(1, 0), out_axes=1)(logits, jnp.arange(drafted))
        return DraftTree.chain(token, drafts, drawn_from), memory
