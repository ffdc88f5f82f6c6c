"""Continuous batching: a fixed number of slots, each with a request of its own, and the next request when one is done.

    prompts -> one session each: prefill alone -> its row into a free slot -> chunks over all slots -> finished sessions

A prompt runs alone, as it does in a session of its own, and its state is then written over a slot of the running one.
So nothing compiles anew for another mixture of prompts, and no reply depends on its slot mates. While requests wait, a
chunk ends as soon as a row does: no slot stands idle longer than the host needs to read that and to run the next
prompt. What the host does for prompts and replies, it does while the device works.

A slot's bookkeeping is its request's session (`Session` or `DraftedSession`); the first one also knows how a chunk is
decoded, drafts and the choice of their width included.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax.decode.draft.session import DraftedSession
from omni_jax.decode.session import Session
from omni_jax.decode.text import CHUNK, Rows, caches_of, laid, retire
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.values import whole
from omni_jax.ops.cache import KVCache
from omni_jax.sharding import round_up_rows


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prepared conversation, a batch of one row, with its own seed and limit.

    ends: whether a reply of these token ids so far is complete, asked after every chunk; a reply may hold tokens behind
    its end, which came in the same chunk.
    """

    batch: Batch
    seed: int
    max_new_tokens: int
    ends: Callable[[list[int]], bool] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.batch, Batch):
            raise InputError(
                f"a prompt takes a prepared batch, not a {type(self.batch).__name__}; use prepare(messages)"
            )
        if len(self.batch.mask) != 1:
            raise InputError(f"a prompt of {len(self.batch.mask)} conversations; give them one by one")


@dataclass(eq=False)
class Taken:
    """A request in its slot. number: which of the prompts it was.

    since: when it was taken, by `time.perf_counter`; seconds: from then until it was done. first: its first token
    [1, 1] while the host has not read it. ended: whether the prompt's `ends` has said so.
    """

    number: int
    prompt: Prompt
    session: Session
    since: float
    first: jax.Array | None
    seconds: float = 0.0
    ended: bool = False


@partial(jax.jit, static_argnames="rows")
def idle(state: Any, *, rows: int) -> Any:
    """A state of `rows` rows that are all done, shaped like `state` of one row."""

    def repeat(leaf: Any) -> Any:
        return leaf.repeat(rows) if isinstance(leaf, KVCache) else jnp.repeat(leaf, rows, axis=0)

    def finish(leaf: Any) -> Any:
        return replace(leaf, done=jnp.ones((rows,), bool)) if isinstance(leaf, Rows) else leaf

    repeated = jax.tree.map(repeat, state, is_leaf=lambda leaf: isinstance(leaf, KVCache))
    return laid(jax.tree.map(finish, repeated, is_leaf=lambda leaf: isinstance(leaf, Rows)))


@partial(jax.jit, donate_argnames="state")
def insert(state: Any, row: Any, b: jax.Array | int) -> Any:
    """The state with `row`, a state of one row, in place of its row `b`.

    Whatever a decoding loop carries has its rows first, except caches, which put rows in themselves.
    """

    def put(leaf: Any, new: Any) -> Any:
        return leaf.insert(new, b) if isinstance(leaf, KVCache) else leaf.at[b].set(new[0])

    return laid(jax.tree.map(put, state, row, is_leaf=lambda leaf: isinstance(leaf, KVCache)))


class Slots:
    """Runs prompts in a number of slots; iterate over `finished`.

    prompts: taken as slots come free, one ahead; None stands for "none at the moment, ask again when a reply is out".
    session: makes the session of one prompt; all draw and draft alike. slots: at least so many, and as many more as
    make the `mesh` that the sessions run on divide them. Raises InputError for a number that is none.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt | None],
        session: Callable[[Prompt], Session],
        slots: int,
        mesh: Mesh | None = None,
    ):
        slots = whole("slots", slots, "have at least one")
        self.prompts, self.session = iter(prompts), session
        self.taken: list[Taken | None] = [None] * round_up_rows(slots, mesh)
        self.state: Any = None
        self.lead: Session | None = None
        self._next: Prompt | None = None
        self._number = 0
        self._over = False

    def finished(self) -> Iterator[Taken]:
        """Each request once it is done, in the order in which they end."""
        ready: list[Taken] = []
        while True:
            self._fill()
            tokens = self._decode() if any(self.taken) else None
            # The device works while the caller looks at what is ready.
            yield from ready
            if tokens is not None:
                self._look_ahead()
                ready = self._read(tokens)
            elif self._over:
                return
            elif not ready:
                raise RuntimeError("the prompts gave None while no reply was awaited")
            else:
                ready = []

    def _look_ahead(self) -> None:
        """Have the next prompt prepared, if there is one."""
        if self._next is None and not self._over:
            try:
                self._next = next(self.prompts)
            except StopIteration:
                self._over = True

    def _fill(self) -> None:
        """Put prompts into free slots."""
        for b, taken in enumerate(self.taken):
            if taken is not None:
                continue
            self._look_ahead()
            if self._next is None:
                return
            prompt, self._next = self._next, None
            since, session = time.perf_counter(), self.session(prompt)
            first, row = session.begin()
            self.taken[b] = Taken(self._number, prompt, session, since, first)
            self._number += 1
            if self.lead is None:
                self.lead, self.state = session, idle(row, rows=len(self.taken))
            self.state = self.lead.grow(self.state, _slots(row))
            self.state = insert(self.state, row, np.int32(b))
            # The prompt's own arrays, which only prefill reads.
            session.tapped = None

    def _decode(self) -> jax.Array:
        """Dispatch a chunk over all slots: its tokens, [B, n] or [B, rounds, n]."""
        lead = self.lead
        assert lead is not None
        if isinstance(lead, DraftedSession) and lead.chooser is None:
            lead.settle(self.state)
        _, most = lead.progress(CHUNK)
        # At least what was read and what may stand unread: the first token.
        room = (taken.session.room(len(taken.session.rows[0]) + 1 + most) for taken in self.taken if taken)
        self.state = lead.grow(self.state, max(room))
        waiting = all(self.taken) and not self._over
        tokens, self.state = lead.decode(self.state, CHUNK, until=1 if waiting else None)
        return tokens

    def _read(self, tokens: jax.Array) -> list[Taken]:
        """Wait for a chunk and book its tokens: the requests that are done, whose slots are free."""
        drawn, done = np.asarray(tokens), []
        for b, taken in enumerate(self.taken):
            if taken is None:
                continue
            session = taken.session
            if isinstance(session, DraftedSession) and isinstance(self.lead, DraftedSession):
                # All learn from all rows: the width is one for the whole state.
                session.chooser = self.lead.chooser
            if taken.first is not None:
                session.take(taken.first)
                taken.first = None
            session.take(drawn[b : b + 1])
            if not session.done and taken.prompt.ends is not None and taken.prompt.ends(session.rows[0]):
                taken.ended = True
            if taken.ended or session.met[0] is not None:
                # The device knows of stop ids and limits only.
                self.state = retire(self.state, np.int32(b))
            if session.done or taken.ended:
                taken.seconds = time.perf_counter() - taken.since
                done.append(taken)
                self.taken[b] = None
        return done


def _slots(state: Any) -> int:
    """The slots of the largest cache of a state."""
    return max(cache.capacity for cache in caches_of(state))
