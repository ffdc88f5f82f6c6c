"""What a request may ask for, checked before anything is prepared: where replies end, their number, their seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.config import DecoderConfig
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.stops import StopStrings
from omni_jax.decode.text import NO_TOKEN
from omni_jax.errors import InputError
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.values import is_whole, listed, shown, whole


@dataclass(frozen=True, eq=False)
class Limits:
    """Where replies end: after a number of tokens, after a stop id, or before a stop string."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    stops: StopStrings | None = None

    @classmethod
    def read(cls, max_new_tokens: Any, stop: Any, stop_ids: Any, text: DecoderConfig, tokenizer: Tokenizer) -> "Limits":
        """The limits that a caller's arguments state, for a Thinker of this `text`.

        Raises InputError, with the remedy, for invalid arguments.
        """
        most, ids = limit_of(max_new_tokens), stop_ids_of(stop_ids, text.vocab_size)
        if most >= (context := text.max_position_embeddings):
            raise InputError(
                f"max_new_tokens is {shown(most)}, but the model's context of {context} holds the prompt too; "
                "ask for fewer"
            )
        stops = StopStrings.read(stop, tokenizer)
        return cls(most, tuple(ids[ids >= 0].tolist()), stops if stops.strings else None)

    def but(self, max_new_tokens: Any, stop: Any, stop_ids: Any, text: DecoderConfig, tokenizer: Tokenizer) -> "Limits":
        """The same with another number of tokens, and with other stop strings and ids unless they are None.

        Raises as `read`.
        """
        ids, stops = self.stop_ids, self.stops
        if stop_ids is not None:
            ids = tuple(i for i in stop_ids_of(stop_ids, text.vocab_size).tolist() if i != NO_TOKEN)
        if stop is not None:
            read = StopStrings.read(stop, tokenizer)
            stops = read if read.strings else None
        return Limits(limit_of(max_new_tokens), ids, stops)


def limit_of(max_new_tokens: Any) -> int:
    """A limit of new tokens as an int. Raises InputError for anything but a whole number of at least one."""
    return whole("max_new_tokens", max_new_tokens, "ask for a whole number, at least one token")


def stop_ids_of(stop_ids: Any, vocab_size: int) -> np.ndarray:
    """The token ids that end a reply, int32 [n], sorted and padded with an id that no token has.

    n is a power of two, so that few programs are compiled. Raises InputError for ids outside the vocabulary.
    """
    ids = listed("stop_ids", stop_ids, "give a list of token ids")
    for i in ids:
        if not is_whole(i):
            raise InputError(f"stop id {shown(i)} is no whole number; give some from 0 to {vocab_size - 1}")
        if not 0 <= i < vocab_size:
            raise InputError(f"stop id {shown(i)} is outside the vocabulary of {vocab_size} tokens")
    ids = sorted({int(i) for i in ids})
    size = 1 << (len(ids) - 1).bit_length() if ids else 1
    return np.asarray(ids + [NO_TOKEN] * (size - len(ids)), np.int32)


def seeds_of(seed: Any, rows: int, copies: int = 1) -> list[int]:
    """The seeds of `copies` replies to each of `rows` prompts, from one seed for all prompts or one for each.

    The replies to a prompt of seed s have the seeds s, s + 1, ... Raises InputError for anything else, and for another
    number of seeds.
    """
    remedy = f"a seed is a whole number from 0 to 2^63 - {copies}"
    if isinstance(seed, set | frozenset):
        raise InputError(f"seed is {shown(seed)}, which has no order; give a list, one for each conversation")
    seeds = [seed] * rows if is_whole(seed) else listed("seed", seed, remedy)
    if len(seeds) != rows:
        raise InputError(f"{len(seeds)} seeds for {rows} conversations; give one seed, or one for each")
    first = [whole("seed", s, remedy, least=0, most=2**63 - copies) for s in seeds]
    return [s + i for s in first for i in range(copies)]


def copies_of(n: Any, sampling: Sampling) -> int:
    """How many replies each conversation gets. Raises InputError for several that would all be the same."""
    copies = 1 if n is None else whole("n", n, "ask for a whole number, at least one reply")
    if copies > 1 and sampling.temperature == 0:
        raise InputError(f"n is {copies}, but greedy replies are all the same; set a temperature, or leave out n")
    return copies


def check_conversations(conversations: Any) -> None:
    """Raise InputError unless these may be conversations, any number of them."""
    remedy = "give a list or iterator of conversations, each a list of messages"
    if not isinstance(conversations, Iterable) or isinstance(conversations, str | bytes | Mapping):
        raise InputError(f"conversations is {shown(conversations)}; {remedy}")
    if isinstance(conversations, Sequence) and len(conversations) and isinstance(conversations[0], Mapping):
        raise InputError(f"conversations is a single one; {remedy}, and ask generate for one reply")
