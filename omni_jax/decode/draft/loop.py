"""Decoding in rounds: draft a block, verify it in one forward of the Thinker, keep what is accepted.

    draft W - 1 tokens -> Thinker on W tokens -> accept -> move the lengths -> update the drafter's memory

A draft is a chain or a tree. The nodes of a tree are written into the cache after a row's tokens, as a chain is, each
seeing its own ancestors; those on the accepted path are moved together afterwards.

A round is one step of a compiled loop, and a chunk of rounds runs without a read by the host. Nothing is copied to undo
a rejected draft: caches hold a length per row, and positions after it are written again. Hidden states that the drafter
reads are captured by the verifying forward itself.

A drafter of any kind is a `Proposer`: what it keeps of each conversation is its `memory`, what it does in each round is
`propose`. Its parameters travel with the Thinker's.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from omni_jax.decode.compiling import LOOP_OPTIONS
from omni_jax.decode.draft.accept import accept_by_rejection, accept_matching
from omni_jax.decode.draft.tree import DraftSampler, DraftTree
from omni_jax.decode.sampling import Plan
from omni_jax.decode.text import CHUNK, NO_TOKEN, DecodeState, reported, reported_shape
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Thinker
from omni_jax.ops.attention import tree_mask
from omni_jax.ops.cache import lay_over
from omni_jax.sharding import Array, replicate


class Proposer(Protocol):
    """A kind of drafter: static under jit and compared by identity, hence a frozen dataclass with `eq=False`."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The numbers of the Thinker's hidden states that it reads."""
        ...

    @property
    def default_tokens(self) -> int:
        """Tokens that it drafts per round unless the request says another number."""
        ...

    @property
    def max_tokens(self) -> int:
        """The most tokens that it drafts per round."""
        ...

    def empty(self, params: Any, rows: int, capacity: int, dtype: Any) -> Any:
        """The memory of `rows` rows that have read nothing; a pytree with room for `capacity` tokens."""
        ...

    def grow(self, memory: Any, capacity: int) -> Any:
        """The same memory with room for `capacity` tokens, outside `jit`; the argument must not be used afterwards."""
        ...

    def remember(self, params: Any, thinker: Thinker, memory: Any, seen: "Seen") -> Any:
        """The memory once it has read the tokens of `seen` too."""
        ...

    def propose(
        self, params: Any, thinker: Thinker, memory: Any, token: jax.Array, verify_tokens: int, choose: DraftSampler
    ) -> tuple[DraftTree, Any]:
        """Drafts that follow the current token int32 [B], `verify_tokens` nodes with it, and the memory.

        The memory has the same lengths as before; positions past them may be overwritten. choose: called as
        `choose(logits, step)` for draft number `step` (from 0) with logits [B, V], returns the draft int32 [B] and the
        logits [B, V] that it was drawn from, or None. These, as [B, W - 1, V], go into the DraftTree.
        """
        ...

    def max_emitted(self, verify_tokens: int) -> int:
        """The most tokens that a round that verifies `verify_tokens` can give."""
        ...

    def slots_written(self, verify_tokens: int) -> int:
        """The most cache positions after a row's length that such a round writes."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """Tokens that the Thinker has run, and what it made of them.

    token_ids and next_ids int32 [B, T]: the tokens, and those after them. features [B, T, n * D]: the tapped hidden
    states side by side. count int32 [B]: how many of the T are real.
    """

    token_ids: jax.Array
    next_ids: jax.Array
    features: jax.Array
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SpeculativeState:
    """What the loop carries: the plain loop's state, and the drafter's memory of all that this state has run.

    drafting: bool [B], which rows draft; the others give one token in a round.
    """

    decode: DecodeState
    memory: Any
    drafting: jax.Array


def rounds_for(steps: int, max_emitted: int) -> int:
    """How many rounds that give up to `max_emitted` tokens each replace `steps` plain steps."""
    return max(1, steps // max_emitted)


def features_of(tapped: jax.Array) -> jax.Array:
    """Tapped hidden states [n, B, T, D] side by side: [B, T, n * D]."""
    n, B, T, D = tapped.shape
    return jnp.moveaxis(tapped, 0, 2).reshape(B, T, n * D)


@partial(jax.jit, static_argnames=("proposer", "declaration", "capacity"), donate_argnames=("state", "memory"))
def begin_drafting(
    params: tuple[dict, Any],
    state: DecodeState,
    tapped: jax.Array,
    token_ids: Array,
    drafting: Array,
    memory: Any | None = None,
    start: Array | int = 0,
    *,
    proposer: Proposer,
    declaration: Declaration,
    capacity: int,
) -> SpeculativeState:
    """The state after a prefill that tapped hidden states [n, B, T, D] of the prompts int32 [B, T].

    drafting: bool [B], which rows draft. memory: of `start` tokens before these, with room for `capacity`; by default
    there are none. The state and the memory given are donated.
    """
    thinker: Thinker = bind(declaration, params[0])
    features, length = features_of(tapped), state.cache.length - start
    B, T, _ = features.shape
    ids = jnp.asarray(token_ids)
    following = jnp.roll(ids, -1, axis=1)
    following = jnp.where(jnp.arange(T) == length[:, None] - 1, state.rows.token[:, None], following)
    if memory is None:
        memory = proposer.empty(params[1], B, capacity, features.dtype)
    memory = lay_over(memory, declaration.mesh)
    memory = proposer.remember(params[1], thinker, memory, Seen(ids, following, features, length))
    return lay_over(SpeculativeState(state, memory, jnp.asarray(drafting)), declaration.mesh)


@partial(
    jax.jit,
    static_argnames=("proposer", "declaration", "plan", "verify_tokens", "drawn", "unroll"),
    donate_argnames="state",
    compiler_options=LOOP_OPTIONS,
)
def decode_rounds(
    params: tuple[dict, Any],
    state: SpeculativeState,
    rounds: Array | int,
    stop_ids: Array,
    values: dict,
    *,
    proposer: Proposer,
    declaration: Declaration,
    plan: Plan,
    verify_tokens: int,
    drawn: bool = False,
    unroll: int | None = None,
    until: Array | int | None = None,
) -> tuple[jax.Array, SpeculativeState]:
    """Run up to `rounds` rounds (at most those of a chunk): tokens int32 [B, R, n], -1 where none, and the next state.

    Tokens are as `reported` gives them. n is the most that a round gives, R the rounds of a chunk. params: the
    Thinker's and the drafter's. stop_ids, values: as in `decode_chunk`. verify_tokens: W, the tokens that a round
    verifies, 1 for rounds without a draft. drawn: whether drafts are drawn as the plan says, not greedily. until: as in
    `decode_chunk`. The caches must have room for what the rounds give and the last one writes.
    """
    thinker: Thinker = bind(declaration, params[0])
    B = state.decode.rows.token.shape[0]
    max_emitted = proposer.max_emitted(verify_tokens)
    tokens = jnp.full((rounds_for(CHUNK, max_emitted), B, max_emitted, *reported_shape(plan)), NO_TOKEN, jnp.int32)
    draft_plan = plan if drawn else Plan(greedy=True, penalised=False, candidates=0)

    def step(carry: tuple) -> tuple:
        i, state, tokens = carry
        rows, memory = state.decode.rows, state.memory
        if verify_tokens > 1:
            choose = DraftSampler(rows.keys, state.decode.cache.length + 1, values, draft_plan)
            drafts, memory = proposer.propose(params[1], thinker, memory, rows.token, verify_tokens, choose)
            drafts = drafts.only(state.drafting)
        else:
            drafts = DraftTree.chain(rows.token, jnp.zeros((B, 0), jnp.int32))
        emitted, decode, seen = _verify(thinker, drafts, state.decode, proposer.taps, stop_ids, values, plan, unroll)
        memory = proposer.remember(params[1], thinker, memory, seen)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, emitted, i, 0)
        return i + 1, SpeculativeState(decode, memory, state.drafting), tokens

    enough = B if until is None else until

    def going(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < rounds) & (jnp.sum(state.decode.rows.done) < enough)

    _, state, tokens = jax.lax.while_loop(going, step, (jnp.int32(0), state, tokens))
    return replicate(jnp.swapaxes(tokens, 0, 1), declaration.mesh), lay_over(state, declaration.mesh)


def grow(state: SpeculativeState, *, proposer: Proposer, capacity: int) -> SpeculativeState:
    """The same state with caches of at least `capacity` positions; the argument must not be used afterwards."""
    decode = replace(state.decode, cache=state.decode.cache.grow(capacity))
    return replace(state, decode=decode, memory=proposer.grow(state.memory, capacity))


def _verify(
    thinker: Thinker,
    drafts: DraftTree,
    state: DecodeState,
    taps: tuple[int, ...],
    stop_ids: Array,
    values: dict,
    plan: Plan,
    unroll: int | None,
) -> tuple[jax.Array, DecodeState, Seen]:
    """Run drafts through the Thinker: what is emitted int32 [B, n], as reported, the next state, and what was seen."""
    length = state.cache.length
    x = thinker.embed_tokens(drafts.token_ids)
    if drafts.is_chain:
        position, mask = state.positions(jnp.arange(x.shape[1])), None
    else:
        ancestors = drafts.ancestors()
        position = state.positions(jnp.sum(ancestors, axis=2) - 1)
        mask = tree_mask(length, ancestors, state.cache.capacity)
    out = thinker.extend(x, position, state.cache, taps=taps, unroll=unroll, mask=mask)
    rule = accept_matching if drafts.draft_logits is None else accept_by_rejection
    logits = thinker.logits(out.hidden)
    emitted, path, rows = rule(logits, drafts, state.rows, length, stop_ids, values, plan)
    cache, token_ids, tapped = replace(out.cache, length=length), drafts.token_ids, out.taps
    if not drafts.is_chain:
        cache = cache.pick(path)
        token_ids = jnp.take_along_axis(token_ids, path, axis=1)
        tapped = jnp.take_along_axis(tapped, path[None, ..., None], axis=2)
    # All emitted tokens but the last have been run, and so has the current token.
    count = jnp.sum(emitted >= 0, axis=1, dtype=jnp.int32)
    state = replace(state, cache=cache.advance(count), rows=rows)
    seen = Seen(token_ids, emitted, features_of(tapped), count)
    if plan.top_logprobs is not None:
        logits = jnp.take_along_axis(logits, path[..., None], axis=1)
    return reported(emitted, logits, plan), state, seen
