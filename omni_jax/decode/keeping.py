"""What is kept of earlier requests, found again by its content: features of media, and caches of conversations.

    arrays of media   -> digest -> features, instead of another run of an encoder
    prompt of a request -> the longest common beginning with a kept conversation -> its cache, up to there

Beginnings are found by the digests of whole blocks of tokens, however many conversations are kept. Two conversations
are alike up to a token if all tokens up to there are equal, with their positions and, at media, with what the encoder
reads and the place in it. Whoever goes on from a kept cache gets what a run of the whole prompt gives, up to rounding.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

from omni_jax.decode.request import Request
from omni_jax.inputs.audio import TOKENS_PER_CHUNK
from omni_jax.inputs.batch import Batch

# Tokens of a kept conversation that a prompt must go on from. All prompts begin alike, and a few tokens save nothing:
# they run in about the time of one, and to copy their cache out and in takes longer.
LEAST = 64
# Tokens of a block; of conversations that share equally many whole blocks with a prompt, so many are compared at most.
BLOCK, COMPARED = 16, 8
# What tells tokens apart: id, three positions, two halves of a digest, and the place in what was digested.
COLUMNS = 7


@dataclass(frozen=True, eq=False)
class Conversation:
    """What is kept of a request: what its tokens are, its caches, and hidden states.

    contents: int64 [n, 7] of the n tokens that the caches hold. state: caches, and what else an engine keeps, of one
    row. hidden: states of its prompt, [k, 1, T, D], if speech wanted them.
    """

    contents: np.ndarray
    state: Any
    hidden: jax.Array | None

    @cached_property
    def beginnings(self) -> list[bytes]:
        """What stands for its first block, for the first two, and so on."""
        return beginnings(self.contents)


@dataclass(frozen=True, eq=False)
class Beginning:
    """A kept conversation that a prompt begins with, up to its first `tokens` tokens."""

    conversation: Conversation
    tokens: int


class Store:
    """Keeps things until they are more than a number of bytes; what was used least recently goes first.

    bytes: what it holds now, on all devices together.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: dict[Any, Any] = {}
        # By whether they must have hidden states, and by each beginning; and by their last whole block.
        self._by_beginning: dict[tuple[bool, bytes], dict[Conversation, None]] = {}
        self._by_end: dict[bytes, dict[Conversation, None]] = {}

    def features(self, arrays: Iterable[np.ndarray], encode: Callable[[], Any]) -> Any:
        """The features of media by the arrays [...] that an encoder reads; `encode` makes them if they are not kept."""
        key = b"".join(digest(array) for array in arrays)
        if key in self._kept:
            return self._use(key)
        return self._put(key, encode())

    def keep(self, conversation: Conversation) -> None:
        """Keep a conversation that is long enough to be found, instead of those that are its beginning."""
        if len(conversation.contents) <= LEAST:
            return
        for key in conversation.beginnings:
            for kept in _latest(self._by_end.get(key)):
                longer = conversation.hidden is not None or kept.hidden is None
                if longer and common(kept.contents, conversation.contents) == len(kept.contents):
                    self._drop(kept)
        self._put(conversation, conversation)
        if conversation in self._kept:
            for index, key in self._places(conversation):
                index.setdefault(key, {})[conversation] = None

    def find(self, contents: np.ndarray, hidden: bool) -> Beginning | None:
        """The kept conversation that a prompt int64 [T, 7] goes on from, if any; at least one token is left to run.

        hidden: whether hidden states at media positions are wanted too.
        """
        found, room, keys = None, len(contents) - 1, beginnings(contents)
        searched = [(self._alike(keys, hidden), room)]
        if hidden:
            # One without hidden states can be gone on from as far as there are no media.
            media = first_media(contents)
            searched.append((self._alike(keys[: media // BLOCK], False), min(media, room)))
        for alike, most in searched:
            for kept in alike:
                # A drafter has read a token together with the next one, which may be another.
                tokens = min(common(kept.contents, contents), most) - 1
                if tokens >= LEAST and (found is None or tokens > found.tokens):
                    found = Beginning(kept, tokens)
        if found is not None:
            self._use(found.conversation)
        return found

    def _alike(self, keys: list[bytes], hidden: bool) -> list[Conversation]:
        """At most COMPARED of the conversations that share the most of these `beginnings`, latest first.

        hidden: only those with hidden states.
        """
        shared = ((hidden, key) for key in reversed(keys) if (hidden, key) in self._by_beginning)
        return _latest(self._by_beginning.get(next(shared, (hidden, b""))))

    def _places(self, conversation: Conversation) -> Iterator[tuple[dict[Any, dict[Conversation, None]], Any]]:
        """Where a conversation is found: each index, and its key there."""
        keys = conversation.beginnings
        yield self._by_end, keys[-1]
        for hidden in {False, conversation.hidden is not None}:
            for key in keys:
                yield self._by_beginning, (hidden, key)

    def _use(self, key: Any) -> Any:
        self._kept[key] = self._kept.pop(key)
        return self._kept[key]

    def _put(self, key: Any, value: Any) -> Any:
        size = bytes_of(value)
        if size <= self.most_bytes:
            self._kept[key] = value
            self.bytes += size
        while self.bytes > self.most_bytes:
            self._drop(next(iter(self._kept)))
        return value

    def _drop(self, key: Any) -> None:
        value = self._kept.pop(key)
        self.bytes -= bytes_of(value)
        if isinstance(value, Conversation):
            for index, place in self._places(value):
                del index[place][value]
                if not index[place]:
                    del index[place]


@dataclass(eq=False)
class _Prompt:
    """The prompt of a request that runs: its contents, the tokens of it that were kept, and its hidden states."""

    contents: np.ndarray
    rope_delta: float
    cached_tokens: int
    hidden: jax.Array | None = None


class Keeper:
    """Finds and keeps the conversations of the requests of an engine.

    store: where they are, with the features of their media.
    """

    def __init__(self, store: Store):
        self.store = store
        self._prompts: WeakKeyDictionary[Request, _Prompt] = WeakKeyDictionary()

    def begin(self, request: Request, contents: np.ndarray, rope_delta: float, hidden: bool) -> Beginning | None:
        """What is kept of the prompt of a request, int64 [T, 7]; rope_delta: as in `Batch`; hidden: as in `find`."""
        found = self.store.find(contents, hidden)
        self._prompts[request] = _Prompt(contents, rope_delta, 0 if found is None else found.tokens)
        return found

    def note_hidden(self, request: Request, hidden: jax.Array | None) -> None:
        """Note the hidden states [k, 1, T, D] of a request's prompt, if there are any."""
        self._prompts[request].hidden = hidden

    def end(self, request: Request, take: Callable[[int], Any]) -> None:
        """Keep the conversation of a request that is complete.

        take: gives a copy of its state of one row, whose caches have room for this number of tokens.
        """
        prompt = self._prompts.get(request)
        if prompt is None:
            return
        # The last token has not been run.
        if len(prompt.contents) + len(request.token_ids) - 1 <= LEAST:
            return
        contents = continued(prompt.contents, request.token_ids, prompt.rope_delta)[:-1]
        self.store.keep(Conversation(contents, take(len(contents)), prompt.hidden))

    def stats(self, request: Request) -> dict[str, Any]:
        """How many tokens of a request's prompt were kept."""
        prompt = self._prompts.get(request)
        return {"cached_tokens": 0 if prompt is None else prompt.cached_tokens}


def bytes_of(value: Any) -> int:
    """The bytes of the arrays of a tree, or of a conversation."""
    if isinstance(value, Conversation):
        value = (value.contents, value.state, value.hidden)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(value))


def digest(array: np.ndarray) -> bytes:
    """16 bytes that tell an array [...] from all others."""
    form = blake2b(f"{array.shape} {array.dtype}".encode(), digest_size=16)
    return blake2b(array.tobytes(), digest_size=16, key=form.digest()).digest()


def _latest(kept: dict[Conversation, None] | None) -> list[Conversation]:
    return list(islice(reversed(kept or {}), COMPARED))


def beginnings(contents: np.ndarray) -> list[bytes]:
    """What stands for the first block of contents [T, 7], for the first two, and so on."""
    found, key = list[bytes](), b""
    for begin in range(0, len(contents) - BLOCK + 1, BLOCK):
        key = blake2b(key + contents[begin : begin + BLOCK].tobytes(), digest_size=16).digest()
        found.append(key)
    return found


def common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of rows with which two arrays [n, C] begin alike."""
    n = min(len(one), len(other))
    same = (one[:n] == other[:n]).all(axis=1)
    return n if same.all() else int(np.argmin(same))


def first_media(contents: np.ndarray) -> int:
    """The number of tokens, of contents int64 [T, 7], before the first of media."""
    media = contents[:, 4:].any(axis=1)
    return int(np.argmax(media)) if media.any() else len(contents)


def contents_of(batch: Batch, merge_size: int) -> np.ndarray:
    """What tells the tokens of a batch of one row apart, int64 [T, 7]. merge_size: of the vision encoder."""
    contents = np.zeros((batch.token_ids.shape[1], COLUMNS), np.int64)
    contents[:, 0] = batch.token_ids[0]
    contents[:, 1:4] = batch.position_ids[:, 0].T.astype(np.float32).view(np.int32)
    base = 0
    for rows in batch.vision:
        tokens = rows.patches.shape[1] // merge_size**2
        base = _mark(contents, batch.visual_index[0], base, tokens, list(zip(rows.patches, rows.grid, strict=True)))
    if batch.audio is not None:
        heard = batch.audio
        windows = list(zip(heard.mel, heard.frames, heard.width, strict=True))
        _mark(contents, batch.audio_index[0], 0, heard.mel.shape[1] * TOKENS_PER_CHUNK, windows)
    return contents


def continued(contents: np.ndarray, token_ids: list[int], rope_delta: float) -> np.ndarray:
    """The contents int64 [T, 7] of a prompt with the tokens of its reply after them, int64 [T + n, 7]."""
    more = np.zeros((len(token_ids), COLUMNS), np.int64)
    more[:, 0] = token_ids
    at = (len(contents) + np.arange(len(token_ids)) + rope_delta).astype(np.float32)
    more[:, 1:4] = at.view(np.int32)[:, None]
    return np.concatenate([contents, more])


def _mark(contents: np.ndarray, index: np.ndarray, base: int, tokens: int, rows: list[tuple[np.ndarray, ...]]) -> int:
    """Write the digest and the place of each token of media, by its index int32 [T] from `base` on.

    rows: what an encoder reads, each row by itself, for `tokens` tokens each. Returns the first index after them.
    """
    end = base + tokens * len(rows)
    row, place = np.divmod(index - base, tokens)
    for r in np.unique(row[(index >= base) & (index < end)]):
        here = (index >= base) & (row == r)
        contents[here, 4:6] = np.frombuffer(blake2b(b"".join(map(digest, rows[r])), digest_size=16).digest(), np.int64)
        contents[here, 6] = 1 + place[here]
    return end
