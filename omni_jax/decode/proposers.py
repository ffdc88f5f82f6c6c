"""How each kind of drafter takes part in a round: DFlash as a block, EAGLE-3 as a chain.

Both draft greedily, whatever the request's temperature: a draft stands where it equals what the target draws, and the
likeliest token equals it most often.

Source: z-lab's `spec_generate` (DFlash), EAGLE's `topK_genrate` with one candidate a step (the chain).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.decode.speculative import Seen
from omni_jax.draft_config import DFlashConfig
from omni_jax.drafter import Drafter
from omni_jax.models.dflash import DFlash
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import Graph, bind
from omni_jax.models.thinker import Thinker
from omni_jax.ops.cache import KVCache

# Tokens that a chain drafts unless told, the setting of most published measurements, and the most it may.
CHAIN_TOKENS, LONGEST_CHAIN = 3, 16


@dataclass(frozen=True, eq=False)
class BlockProposer:
    """DFlash: remembers keys and values of every token, drafts a block of masks at once.

    usual, most: tokens that it drafts a round unless told, and at most.
    """

    graph: Graph
    taps: tuple[int, ...]
    usual: int
    most: int

    def empty(self, params: dict, rows: int, slots: int, dtype: Any) -> KVCache:
        drafter: DFlash = bind(self.graph, params)
        return drafter.empty(rows, slots, dtype)

    def grow(self, memory: KVCache, slots: int) -> KVCache:
        return memory.grow(slots)

    def remember(self, params: dict, thinker: Thinker, memory: KVCache, seen: Seen) -> KVCache:
        drafter: DFlash = bind(self.graph, params)
        return drafter.remember(memory, drafter.fuse(seen.features), seen.count)

    def propose(
        self, params: dict, thinker: Thinker, memory: KVCache, token: jax.Array, width: int
    ) -> tuple[jax.Array, KVCache]:
        drafter: DFlash = bind(self.graph, params)
        masks = jnp.full((token.shape[0], width - 1), drafter.config.mask_token_id, jnp.int32)
        block = thinker.embed_tokens(jnp.concatenate([token[:, None], masks], axis=1))
        hidden, memory = drafter.draft(block, memory)
        return jnp.argmax(thinker.logits(hidden[:, 1:]), axis=-1).astype(jnp.int32), memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """What EAGLE-3 keeps: its cache, and output [B, D], its last output over tokens that stand."""

    cache: KVCache
    output: jax.Array


@dataclass(frozen=True, eq=False)
class ChainProposer:
    """EAGLE-3: remembers pairs of hidden state and next token, drafts one token after the other."""

    graph: Graph
    taps: tuple[int, ...]
    usual: int
    most: int

    def empty(self, params: dict, rows: int, slots: int, dtype: Any) -> Chain:
        drafter: Eagle3 = bind(self.graph, params)
        return Chain(drafter.empty(rows, slots, dtype), jnp.zeros((rows, drafter.config.layer.hidden_size), dtype))

    def grow(self, memory: Chain, slots: int) -> Chain:
        return Chain(memory.cache.grow(slots), memory.output)

    def remember(self, params: dict, thinker: Thinker, memory: Chain, seen: Seen) -> Chain:
        drafter: Eagle3 = bind(self.graph, params)
        embedded = drafter.embed_tokens(jnp.maximum(seen.next_ids, 0), thinker.embed[...])
        outputs, cache = drafter.extend(drafter.fuse(seen.features), embedded, memory.cache, seen.count)
        last = jnp.maximum(seen.count - 1, 0)[:, None, None]
        output = jnp.take_along_axis(outputs, last, axis=1)[:, 0]
        return Chain(cache, jnp.where(seen.count[:, None] > 0, output, memory.output))

    def propose(
        self, params: dict, thinker: Thinker, memory: Chain, token: jax.Array, width: int
    ) -> tuple[jax.Array, Chain]:
        drafter: Eagle3 = bind(self.graph, params)

        def choose(output: jax.Array) -> jax.Array:
            return drafter.to_target(jnp.argmax(drafter.logits(output), axis=-1)).astype(jnp.int32)

        def step(carry: tuple[jax.Array, KVCache], _: None) -> tuple[tuple[jax.Array, KVCache], jax.Array]:
            output, cache = carry
            draft = choose(output)
            embedded = drafter.embed_tokens(draft, thinker.embed[...])
            outputs, cache = drafter.extend(output[:, None], embedded[:, None], cache)
            return (outputs[:, 0], cache), draft

        (output, cache), drafts = jax.lax.scan(step, (memory.output, memory.cache), None, length=width - 2)
        drafts = jnp.concatenate([drafts, choose(output)[None]]).T
        return drafts, Chain(KVCache(cache.k, cache.v, memory.cache.length), memory.output)


def proposer_for(drafter: Drafter, target_layers: int) -> BlockProposer | ChainProposer:
    """The proposer of a drafter, for a Thinker of `target_layers` layers."""
    taps = drafter.taps(target_layers)
    if isinstance(drafter.config, DFlashConfig):
        drafts = drafter.config.block_size - 1
        return BlockProposer(drafter.graph, taps, drafts, drafts)
    return ChainProposer(drafter.graph, taps, CHAIN_TOKENS, LONGEST_CHAIN)
