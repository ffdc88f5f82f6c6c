"""How EAGLE-3 takes part in a round: it drafts a chain of tokens, one after the other, or a tree of them.

Unless drafts are drawn, a chain is greedy, whatever the request's temperature: a draft is accepted where it equals the
token that the target draws, and the likeliest token equals that most often. A tree holds several likely tokens for one
position; its tokens are always chosen, not drawn.

Source: EAGLE's `topK_genrate` (the tree; the chain is that with one candidate per step).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.decode.draft.loop import Seen
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Thinker
from omni_jax.ops.attention import tree_mask
from omni_jax.ops.cache import KVCache
from omni_jax.ops.top_k import top_k

# Tokens that a chain drafts by default, the setting of most published measurements, and at most.
CHAIN_TOKENS, LONGEST_CHAIN = 3, 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """What EAGLE-3 keeps: its cache, and output [B, D], its last output over accepted tokens."""

    cache: KVCache
    output: jax.Array

    def forget(self, cache: KVCache) -> "Pairs":
        """The same, in a cache that holds more after each row's length, which is not counted."""
        return Pairs(replace(cache, length=self.cache.length), self.output)


@dataclass(frozen=True, eq=False)
class ChainProposer:
    """EAGLE-3: remembers pairs of hidden state and next token, drafts one token after the other.

    taps: numbers of the hidden states that it reads. default_tokens, max_tokens: drafted per round, unless the request
    says another number, and at most.
    """

    declaration: Declaration
    taps: tuple[int, ...]
    default_tokens: int = CHAIN_TOKENS
    max_tokens: int = LONGEST_CHAIN

    def max_emitted(self, verify_tokens: int) -> int:
        """All drafts accepted, and one token of the target's own."""
        return verify_tokens

    def slots_written(self, verify_tokens: int) -> int:
        """The current token and its drafts."""
        return verify_tokens

    def empty(self, params: dict, rows: int, capacity: int, dtype: Any) -> Pairs:
        """The memory of `rows` rows that have read nothing, with `capacity` positions."""
        drafter: Eagle3 = bind(self.declaration, params)
        return Pairs(drafter.empty(rows, capacity, dtype), jnp.zeros((rows, drafter.config.layer.hidden_size), dtype))

    def grow(self, memory: Pairs, capacity: int) -> Pairs:
        """The same memory with `capacity` positions, outside `jit`."""
        return Pairs(memory.cache.grow(capacity), memory.output)

    def remember(self, params: dict, thinker: Thinker, memory: Pairs, seen: Seen) -> Pairs:
        """The memory once it has read the tokens of `seen` too."""
        drafter: Eagle3 = bind(self.declaration, params)
        embedded = drafter.embed_tokens(jnp.maximum(seen.next_ids, 0), thinker.embed[...])
        outputs, cache = drafter.extend(drafter.fuse(seen.features), embedded, memory.cache, seen.count)
        last = jnp.maximum(seen.count - 1, 0)[:, None, None]
        output = jnp.take_along_axis(outputs, last, axis=1)[:, 0]
        return Pairs(cache, jnp.where(seen.count[:, None] > 0, output, memory.output))

    def propose(
        self, params: dict, thinker: Thinker, memory: Pairs, token: jax.Array, verify_tokens: int, choose: DraftSampler
    ) -> tuple[DraftTree, Pairs]:
        """A chain after the current token int32 [B], `verify_tokens` nodes with it; the memory keeps its lengths."""
        drafter: Eagle3 = bind(self.declaration, params)

        def step(carry: tuple[jax.Array, KVCache], i: jax.Array) -> tuple[tuple[jax.Array, KVCache], tuple]:
            output, cache = carry
            chosen, drawn_from = choose(drafter.logits(output), i)
            draft = drafter.to_target(chosen)
            embedded = drafter.embed_tokens(draft, thinker.embed[...])
            outputs, cache = drafter.extend(output[:, None], embedded[:, None], cache)
            return (outputs[:, 0], cache), (draft, drawn_from)

        last = verify_tokens - 2
        (output, cache), drafted = jax.lax.scan(step, (memory.output, memory.cache), jnp.arange(last))
        chosen, drawn_from = choose(drafter.logits(output), last)
        final = (drafter.to_target(chosen), drawn_from)
        drafts, drawn_from = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), drafted, final)
        if drawn_from is not None:
            drawn_from = _over_target(drafter, jnp.swapaxes(drawn_from, 0, 1), thinker.embed.shape[0])
        return DraftTree.chain(token, drafts.T, drawn_from), memory.forget(cache)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frontier:
    """What a level of a tree leaves for the next: the cache, and the k nodes that get children.

    number int32 [B, k]: of each node among all candidates, in the order in which these are made. tokens int32 [B, k].
    scores float32 [B, k]: log-probabilities of the paths to the nodes. before [B, k, D]: the drafter's outputs at
    their parents, which it reads with the tokens. seen bool [B, k, depth * k]: which of the nodes that have been run
    each node attends to, its ancestors. cache: holds the nodes of all levels so far after each row's tokens.
    """

    cache: KVCache
    number: jax.Array
    tokens: jax.Array
    scores: jax.Array
    before: jax.Array
    seen: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Nodes that may be verified: tokens int32, scores float32 and parents int32 (numbers, -1 for none), all [B, C]."""

    tokens: jax.Array
    scores: jax.Array
    parents: jax.Array


@dataclass(frozen=True, eq=False)
class TreeProposer(ChainProposer):
    """EAGLE-3, drafting a tree: at each of `depth` levels the `top_k` likeliest nodes get `top_k` children each.

    Of all children the likeliest `verify_tokens - 1` are verified, by the product of the probabilities on their path.
    """

    depth: int = 7
    top_k: int = 10

    def max_emitted(self, verify_tokens: int) -> int:
        """The longest path accepted, and one token of the target's own."""
        return min(verify_tokens, self.depth + 2)

    def slots_written(self, verify_tokens: int) -> int:
        """What is verified, or what the drafter runs if that is more."""
        return max(verify_tokens, self.depth * self.top_k)

    def propose(
        self, params: dict, thinker: Thinker, memory: Pairs, token: jax.Array, verify_tokens: int, choose: DraftSampler
    ) -> tuple[DraftTree, Pairs]:
        """A tree after the current token int32 [B], `verify_tokens` nodes with it; the memory keeps its lengths."""
        drafter: Eagle3 = bind(self.declaration, params)
        frontier, roots = self._roots(drafter, memory)

        def level(frontier: Frontier, i: jax.Array) -> tuple[Frontier, Candidates]:
            return self._level(drafter, thinker, memory.cache.length, frontier, i)

        # Each level is written after those before it: the lengths that `extend` moves count levels.
        last, made = jax.lax.scan(level, frontier, jnp.arange(self.depth))
        B, C = token.shape[0], self.depth * self.top_k**2
        made = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, C), made)
        candidates = jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), roots, made)
        tree = likeliest(candidates, token, verify_tokens, longest=self.max_emitted(verify_tokens))
        return tree, memory.forget(last.cache)

    def _children(self, drafter: Eagle3, outputs: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens and scores [B, n * k] of the likeliest children of nodes with outputs [B, n, D], scores [B, n]."""
        best, ids = top_k(jax.nn.log_softmax(drafter.logits(outputs), axis=-1), self.top_k)
        B = outputs.shape[0]
        return drafter.to_target(ids).reshape(B, -1).astype(jnp.int32), (scores[..., None] + best).reshape(B, -1)

    def _roots(self, drafter: Eagle3, memory: Pairs) -> tuple[Frontier, Candidates]:
        """The children of the current token: the first frontier, and the same as candidates."""
        B, k = memory.output.shape[0], self.top_k
        tokens, scores = self._children(drafter, memory.output[:, None], jnp.zeros((B, 1)))
        frontier = Frontier(
            memory.cache,
            number=jnp.broadcast_to(jnp.arange(k), (B, k)),
            tokens=tokens,
            scores=scores,
            before=jnp.repeat(memory.output[:, None], k, axis=1),
            seen=jnp.zeros((B, k, self.depth * k), bool),
        )
        return frontier, Candidates(tokens, scores, jnp.full((B, k), -1))

    def _level(
        self, drafter: Eagle3, thinker: Thinker, held: jax.Array, frontier: Frontier, i: jax.Array
    ) -> tuple[Frontier, Candidates]:
        """Run the frontier of level `i`, after `held` int32 [B] tokens: the next frontier, all children [B, k * k]."""
        k, (B, _, _) = self.top_k, frontier.seen.shape
        rows = jnp.arange(B)[:, None]
        # Each node sees itself too.
        seen = frontier.seen | (jnp.arange(self.depth * k) == (i * k + jnp.arange(k))[:, None])
        position = jnp.broadcast_to((held + i)[:, None], (B, k))
        embedded = drafter.embed_tokens(frontier.tokens, thinker.embed[...])
        mask = tree_mask(held, seen, frontier.cache.capacity)
        outputs, cache = drafter.extend(frontier.before, embedded, frontier.cache, None, position, mask)
        made, made_scores = self._children(drafter, outputs, frontier.scores)
        scores, best = jax.lax.top_k(made_scores, k)
        after = Frontier(
            cache,
            number=k + i * k * k + best,
            tokens=made[rows, best],
            scores=scores,
            before=outputs[rows, best // k],
            seen=seen[rows, best // k],
        )
        return after, Candidates(made, made_scores, jnp.repeat(frontier.number, k, axis=1))


def likeliest(candidates: Candidates, token: jax.Array, verify_tokens: int, longest: int) -> DraftTree:
    """The tree of the current token int32 [B] and the `verify_tokens - 1` candidates of the highest scores.

    longest: the most nodes on a path. In the order in which candidates are made, a parent comes before its children and
    has at least their score, so the parents of all that are kept are kept too.
    """
    rows = jnp.arange(token.shape[0])[:, None]
    kept = jnp.sort(jax.lax.top_k(candidates.scores, verify_tokens - 1)[1], axis=1)
    parents = candidates.parents[rows, kept]
    # The node of a parent is the number of kept candidates before it, and one for the current token.
    parent = jnp.sum(kept[:, None, :] < parents[..., None], axis=2) + (parents >= 0)
    token_ids = jnp.concatenate([token[:, None], candidates.tokens[rows, kept]], axis=1)
    return DraftTree(token_ids, jnp.pad(parent, ((0, 0), (1, 0)), constant_values=-1), longest=longest)


def _over_target(drafter: Eagle3, logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits over the draft vocabulary [..., Vd] as logits over the target's [..., V], -inf where it has none."""
    ids = drafter.to_target(jnp.arange(logits.shape[-1]))
    return jnp.full((*logits.shape[:-1], vocab_size), -jnp.inf).at[..., ids].set(logits)
