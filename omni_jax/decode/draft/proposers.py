"""How each kind of drafter takes part in a round: DFlash as a block, EAGLE-3 as a chain.

Unless told to draw, both draft greedily, whatever the request's temperature: a draft stands where it equals what the
target draws, and the likeliest token equals it most often. EAGLE-3 also drafts trees, which hold several likely tokens
for one position; they are always chosen, not drawn.

Source: z-lab's `spec_generate` (DFlash), EAGLE's `topK_genrate` (the tree; the chain is that with one candidate a
step).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.decode.draft.loop import Proposer, Seen
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.draft_config import DFlashConfig
from omni_jax.errors import InputError
from omni_jax.inputs.values import is_whole
from omni_jax.models.dflash import DFlash
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Thinker
from omni_jax.ops.attention import tree_mask
from omni_jax.ops.cache import KVCache
from omni_jax.weights.drafters import Drafter

# Tokens that a chain drafts unless told, the setting of most published measurements, and the most it may.
CHAIN_TOKENS, LONGEST_CHAIN = 3, 16
# Tokens of a tree unless told, EAGLE's own setting without the token at hand.
TREE_TOKENS = 59
# The most tokens that a round may verify, and nodes that a drafter may run for a tree.
LARGEST = 256


@dataclass(frozen=True, eq=False)
class BlockProposer:
    """DFlash: remembers keys and values of every token, drafts a block of masks at once.

    usual, most: tokens that it drafts a round unless told, and at most.
    """

    declaration: Declaration
    taps: tuple[int, ...]
    usual: int
    most: int

    def empty(self, params: dict, rows: int, capacity: int, dtype: Any) -> KVCache:
        drafter: DFlash = bind(self.declaration, params)
        return drafter.empty(rows, capacity, dtype)

    def grow(self, memory: KVCache, capacity: int) -> KVCache:
        return memory.grow(capacity)

    def gives(self, width: int) -> int:
        return width

    def writes(self, width: int) -> int:
        return width

    def remember(self, params: dict, thinker: Thinker, memory: KVCache, seen: Seen) -> KVCache:
        drafter: DFlash = bind(self.declaration, params)
        return drafter.remember(memory, drafter.fuse(seen.features), seen.count)

    def propose(
        self, params: dict, thinker: Thinker, memory: KVCache, token: jax.Array, width: int, choose: DraftSampler
    ) -> tuple[DraftTree, KVCache]:
        drafter: DFlash = bind(self.declaration, params)
        masks = jnp.full((token.shape[0], width - 1), drafter.config.mask_token_id, jnp.int32)
        block = thinker.embed_tokens(jnp.concatenate([token[:, None], masks], axis=1))
        hidden, memory = drafter.draft(block, memory)
        logits = thinker.logits(hidden[:, 1:])
        drafts, drawn_from = jax.vmap(choose, in_axes=(1, 0), out_axes=1)(logits, jnp.arange(width - 1))
        return DraftTree.chain(token, drafts, drawn_from), memory


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """What EAGLE-3 keeps: its cache, and output [B, D], its last output over tokens that stand."""

    cache: KVCache
    output: jax.Array

    def forget(self, cache: KVCache) -> "Pairs":
        """The same, in a cache with more written behind it."""
        return Pairs(replace(cache, length=self.cache.length), self.output)


@dataclass(frozen=True, eq=False)
class ChainProposer:
    """EAGLE-3: remembers pairs of hidden state and next token, drafts one token after the other."""

    declaration: Declaration
    taps: tuple[int, ...]
    usual: int = CHAIN_TOKENS
    most: int = LONGEST_CHAIN

    def gives(self, width: int) -> int:
        return width

    def writes(self, width: int) -> int:
        return width

    def empty(self, params: dict, rows: int, capacity: int, dtype: Any) -> Pairs:
        drafter: Eagle3 = bind(self.declaration, params)
        return Pairs(drafter.empty(rows, capacity, dtype), jnp.zeros((rows, drafter.config.layer.hidden_size), dtype))

    def grow(self, memory: Pairs, capacity: int) -> Pairs:
        return Pairs(memory.cache.grow(capacity), memory.output)

    def remember(self, params: dict, thinker: Thinker, memory: Pairs, seen: Seen) -> Pairs:
        drafter: Eagle3 = bind(self.declaration, params)
        embedded = drafter.embed_tokens(jnp.maximum(seen.next_ids, 0), thinker.embed[...])
        outputs, cache = drafter.extend(drafter.fuse(seen.features), embedded, memory.cache, seen.count)
        last = jnp.maximum(seen.count - 1, 0)[:, None, None]
        output = jnp.take_along_axis(outputs, last, axis=1)[:, 0]
        return Pairs(cache, jnp.where(seen.count[:, None] > 0, output, memory.output))

    def propose(
        self, params: dict, thinker: Thinker, memory: Pairs, token: jax.Array, width: int, choose: DraftSampler
    ) -> tuple[DraftTree, Pairs]:
        drafter: Eagle3 = bind(self.declaration, params)

        def step(carry: tuple[jax.Array, KVCache], i: jax.Array) -> tuple[tuple[jax.Array, KVCache], tuple]:
            output, cache = carry
            chosen, drawn_from = choose(drafter.logits(output), i)
            draft = drafter.to_target(chosen)
            embedded = drafter.embed_tokens(draft, thinker.embed[...])
            outputs, cache = drafter.extend(output[:, None], embedded[:, None], cache)
            return (outputs[:, 0], cache), (draft, drawn_from)

        (output, cache), drafted = jax.lax.scan(step, (memory.output, memory.cache), jnp.arange(width - 2))
        chosen, drawn_from = choose(drafter.logits(output), width - 2)
        last = (drafter.to_target(chosen), drawn_from)
        drafts, drawn_from = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), drafted, last)
        if drawn_from is not None:
            drawn_from = _over_target(drafter, jnp.swapaxes(drawn_from, 0, 1), thinker.embed.shape[0])
        return DraftTree.chain(token, drafts.T, drawn_from), memory.forget(cache)


@dataclass(frozen=True, eq=False)
class TreeProposer(ChainProposer):
    """EAGLE-3, drafting a tree: at each of `depth` levels the `top_k` likeliest nodes get `top_k` children each.

    Of all children the likeliest `width - 1` are verified, by the product of their probabilities on the way.
    """

    depth: int = 7
    top_k: int = 10

    def gives(self, width: int) -> int:
        return min(width, self.depth + 2)

    def writes(self, width: int) -> int:
        return max(width, self.depth * self.top_k)

    def propose(
        self, params: dict, thinker: Thinker, memory: Pairs, token: jax.Array, width: int, choose: DraftSampler
    ) -> tuple[DraftTree, Pairs]:
        drafter: Eagle3 = bind(self.declaration, params)
        k, depth, held = self.top_k, self.depth, memory.cache.length
        B, capacity = token.shape[0], memory.cache.capacity
        rows = jnp.arange(B)[:, None]

        def children(outputs: jax.Array, score: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Tokens and scores [B, n * k] of the likeliest children of nodes with outputs [B, n, D]."""
            best, ids = jax.lax.top_k(jax.nn.log_softmax(drafter.logits(outputs), axis=-1), k)
            return drafter.to_target(ids).reshape(B, -1).astype(jnp.int32), (score[..., None] + best).reshape(B, -1)

        # The frontier: numbers of its nodes among all candidates, their tokens and scores, what came before them, and
        # which of the nodes that were run each sees.
        tokens, scores = children(memory.output[:, None], jnp.zeros((B, 1)))
        number, seen = jnp.broadcast_to(jnp.arange(k), (B, k)), jnp.zeros((B, k, depth * k), bool)
        before = jnp.repeat(memory.output[:, None], k, axis=1)

        def level(carry: tuple, i: jax.Array) -> tuple[tuple, tuple]:
            cache, number, tokens, scores, before, seen = carry
            seen |= jnp.arange(depth * k) == (i * k + jnp.arange(k))[:, None]
            position = jnp.broadcast_to((held + i)[:, None], (B, k))
            embedded = drafter.embed_tokens(tokens, thinker.embed[...])
            mask = tree_mask(held, seen, capacity)
            outputs, cache = drafter.extend(before, embedded, cache, None, position, mask)
            made, made_scores = children(outputs, scores)
            scores, best = jax.lax.top_k(made_scores, k)
            parent = jnp.repeat(number, k, axis=1)
            carry = (cache, k + i * k * k + best, made[rows, best], scores, outputs[rows, best // k])
            return (*carry, seen[rows, best // k]), (made, made_scores, parent)

        # Each level is written behind those before it: the lengths that `extend` moves count levels.
        carry = (memory.cache, number, tokens, scores, before, seen)
        (cache, *_), made = jax.lax.scan(level, carry, jnp.arange(depth))
        made = (jnp.moveaxis(x, 0, 1).reshape(B, depth * k * k) for x in made)
        roots = (tokens, scores, jnp.full((B, k), -1))
        tokens, scores, parent = (jnp.concatenate(pair, axis=1) for pair in zip(roots, made, strict=True))
        # In the order in which they were made a parent stands before its children, and its score is no lower.
        kept = jnp.sort(jax.lax.top_k(scores, width - 1)[1], axis=1)
        parent = jnp.sum(kept[:, None, :] < parent[rows, kept][..., None], axis=2) + (parent[rows, kept] >= 0)
        token_ids = jnp.concatenate([token[:, None], tokens[rows, kept]], axis=1)
        parent = jnp.pad(parent, ((0, 0), (1, 0)), constant_values=-1)
        return DraftTree(token_ids, parent, longest=self.gives(width)), memory.forget(cache)


def _over_target(drafter: Eagle3, logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits over the draft vocabulary [..., Vd] as logits over the target's [..., V], -inf where it has none."""
    ids = drafter.to_target(jnp.arange(logits.shape[-1]))
    return jnp.full((*logits.shape[:-1], vocab_size), -jnp.inf).at[..., ids].set(logits)


def check_tree(tree: Any) -> None:
    """Raise InputError unless `tree` is None or holds levels and candidates, of a size that can be drafted."""
    if tree is None:
        return
    if not isinstance(tree, tuple) or len(tree) != 2 or not all(is_whole(n) and n > 0 for n in tree):
        raise InputError(f"draft_tree is {tree!r}; it takes two numbers, levels and candidates, such as (7, 10)")
    if tree[0] * tree[1] > LARGEST:
        raise InputError(f"draft_tree is {tree!r}: {tree[0] * tree[1]} nodes are more than {LARGEST}; take fewer")


def proposer_for(drafter: Drafter, target_layers: int, tree: tuple[int, int] | None = None) -> Proposer:
    """The proposer of a drafter, for a Thinker of `target_layers` layers; `tree` holds its levels and candidates.

    InputError for a tree that it cannot draft.
    """
    taps, config = drafter.taps(target_layers), drafter.config
    if isinstance(config, DFlashConfig):
        if tree is not None:
            raise InputError("a DFlash drafter drafts blocks; leave draft_tree out, or take an EAGLE-3 drafter")
        drafts = min(config.block_size, LARGEST) - 1
        return BlockProposer(drafter.declaration, taps, drafts, drafts)
    if tree is None:
        return ChainProposer(drafter.declaration, taps)
    depth, top_k = tree
    if top_k > config.draft_vocab_size:
        raise InputError(f"draft_tree is {tree!r}; this drafter knows {config.draft_vocab_size} tokens to choose from")
    most = min(top_k + depth * top_k**2, LARGEST - 1)
    return TreeProposer(drafter.declaration, taps, min(TREE_TOKENS, most), most, depth, top_k)
