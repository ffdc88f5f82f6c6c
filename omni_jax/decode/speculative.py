"""Decoding in rounds: draft a block, verify it in one forward of the Thinker, keep what stands.

    draft W - 1 tokens -> Thinker on W tokens -> accept -> move the lengths -> remember what the Thinker made of them

A round is one step of a compiled loop, and a chunk of rounds runs without a read by the host. Nothing is copied to undo
a rejected draft: caches hold a length per row, and slots behind it are written again. Hidden states that the drafter
reads are captured by the verifying forward itself.

A drafter of any kind is a `Proposer`: what it keeps per conversation is its `memory`, and what it does per round is
`propose`. Its parameters travel with the Thinker's.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from omni_jax.decode.accept import accept
from omni_jax.decode.generate import NO_TOKEN, Array, DecodeState
from omni_jax.decode.sampling import Plan
from omni_jax.models.param import Graph, bind
from omni_jax.models.thinker import Thinker


class Proposer(Protocol):
    """A kind of drafter; static under jit and compared by identity."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The numbers of the Thinker's hidden states that it reads."""
        ...

    @property
    def most(self) -> int:
        """The most tokens that it drafts a round."""
        ...

    def empty(self, params: Any, rows: int, slots: int, dtype: Any) -> Any:
        """The memory of `rows` rows that have read nothing; a pytree that holds `slots` tokens."""
        ...

    def grow(self, memory: Any, slots: int) -> Any:
        """The same memory for `slots` tokens."""
        ...

    def remember(self, params: Any, thinker: Thinker, memory: Any, seen: "Seen") -> Any:
        """The memory behind the tokens of `seen`."""
        ...

    def propose(
        self, params: Any, thinker: Thinker, memory: Any, token: jax.Array, width: int
    ) -> tuple[jax.Array, Any]:
        """Drafts int32 [B, width - 1] behind the token at hand, int32 [B], and the memory, which recalls as much."""
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
    """What the loop carries: the plain loop's state and the drafter's memory of all that this has run."""

    decode: DecodeState
    memory: Any


def features_of(tapped: jax.Array) -> jax.Array:
    """Tapped hidden states [n, B, T, D] side by side: [B, T, n * D]."""
    n, B, T, D = tapped.shape
    return jnp.moveaxis(tapped, 0, 2).reshape(B, T, n * D)


@partial(jax.jit, static_argnames=("proposer", "graph", "slots"), donate_argnames="state")
def begin(
    params: tuple[dict, Any],
    state: DecodeState,
    tapped: jax.Array,
    token_ids: Array,
    *,
    proposer: Proposer,
    graph: Graph,
    slots: int,
) -> SpeculativeState:
    """The state behind a prefill that tapped hidden states [n, B, T, D] of the prompts int32 [B, T]."""
    thinker: Thinker = bind(graph, params[0])
    features, length = features_of(tapped), state.cache.length
    B, T, _ = features.shape
    ids = jnp.asarray(token_ids)
    following = jnp.roll(ids, -1, axis=1)
    following = jnp.where(jnp.arange(T) == length[:, None] - 1, state.rows.token[:, None], following)
    memory = proposer.empty(params[1], B, slots, features.dtype)
    memory = proposer.remember(params[1], thinker, memory, Seen(ids, following, features, length))
    return SpeculativeState(state, memory)


@partial(jax.jit, static_argnames=("proposer", "graph", "plan", "rounds", "width", "unroll"), donate_argnames="state")
def decode_rounds(
    params: tuple[dict, Any],
    state: SpeculativeState,
    stop_ids: Array,
    values: dict,
    *,
    proposer: Proposer,
    graph: Graph,
    plan: Plan,
    rounds: int,
    width: int,
    unroll: int = 1,
) -> tuple[jax.Array, SpeculativeState]:
    """Run up to `rounds` rounds: tokens int32 [B, rounds, W], -1 where none, and the state to go on from.

    params: the Thinker's and the drafter's. width: W, 1 for rounds without a draft. The caches must hold as many more
    tokens as rounds times W.
    """
    thinker: Thinker = bind(graph, params[0])
    B = state.decode.rows.token.shape[0]
    tokens = jnp.full((rounds, B, width), NO_TOKEN, jnp.int32)

    def step(carry: tuple) -> tuple:
        i, state, tokens = carry
        token, memory = state.decode.rows.token, state.memory
        block = token[:, None]
        if width > 1:
            drafts, memory = proposer.propose(params[1], thinker, memory, token, width)
            block = jnp.concatenate([block, drafts], axis=1)
        emitted, decode, features = _verify(thinker, block, state.decode, proposer.taps, stop_ids, values, plan, unroll)
        count = jnp.sum(emitted >= 0, axis=1, dtype=jnp.int32)
        memory = proposer.remember(params[1], thinker, memory, Seen(block, emitted, features, count))
        return i + 1, SpeculativeState(decode, memory), jax.lax.dynamic_update_index_in_dim(tokens, emitted, i, 0)

    def going(carry: tuple) -> jax.Array:
        i, state, _ = carry
        return (i < rounds) & ~jnp.all(state.decode.rows.done)

    _, state, tokens = jax.lax.while_loop(going, step, (jnp.int32(0), state, tokens))
    return jnp.swapaxes(tokens, 0, 1), state


@partial(jax.jit, static_argnames=("proposer", "slots"))
def grow(state: SpeculativeState, *, proposer: Proposer, slots: int) -> SpeculativeState:
    """The same state with caches of `slots` slots."""
    decode = replace(state.decode, cache=state.decode.cache.grow(slots))
    return replace(state, decode=decode, memory=proposer.grow(state.memory, slots))


def _verify(
    thinker: Thinker,
    block: jax.Array,
    state: DecodeState,
    taps: tuple[int, ...],
    stop_ids: Array,
    values: dict,
    plan: Plan,
    unroll: int,
) -> tuple[jax.Array, DecodeState, jax.Array]:
    """Run a block int32 [B, W] through the Thinker: what is emitted int32 [B, W], the state behind it, the features."""
    length = state.cache.length
    x = thinker.embed_tokens(block)
    hidden, cache, tapped = thinker.extend(x, state.positions(block.shape[1]), state.cache, taps=taps, unroll=unroll)
    emitted, rows = accept(thinker.logits(hidden), block[:, 1:], state.rows, length, stop_ids, values, plan)
    # Emitted tokens but the last have been run, and so has the token at hand.
    cache = replace(cache, length=length + jnp.sum(emitted >= 0, axis=1, dtype=jnp.int32))
    return emitted, replace(state, cache=cache, rows=rows), features_of(tapped)
