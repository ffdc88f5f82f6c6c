"""What a request may ask for, checked before anything is prepared: where replies end, and how many there are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_jax.config import DecoderConfig
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import limit_of, stop_ids_of
from omni_jax.decode.stops import StopStrings
from omni_jax.errors import InputError
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.values import shown, whole


@dataclass(frozen=True, eq=False)
class Limits:
    """Where replies end: after a number of tokens, after a stop id, or before a stop string."""

    max_new_tokens: int
    stop_ids: list[int]
    stops: StopStrings

    @classmethod
    def read(cls, max_new_tokens: Any, stop: Any, stop_ids: Any, text: DecoderConfig, tokenizer: Tokenizer) -> "Limits":
        """Those of a request's arguments to a Thinker of this `text`; InputError, with the remedy, for what is none."""
        most, ids = limit_of(max_new_tokens), stop_ids_of(stop_ids, text.vocab_size)
        if most >= (context := text.max_position_embeddings):
            raise InputError(
                f"max_new_tokens is {shown(most)}, but the model's context of {context} holds the prompt too; "
                "ask for fewer"
            )
        return cls(most, ids[ids >= 0].tolist(), StopStrings.read(stop, tokenizer))


def copies_of(n: Any, sampling: Sampling) -> int:
    """How many replies each conversation gets; InputError for several that would all be the same."""
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
