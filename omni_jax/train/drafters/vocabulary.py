"""The tokens that EAGLE-3 knows: the most frequent ones of the replies that it is trained on."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.train.batch import IGNORED, TextBatch


def count_learned(batches: Iterable[TextBatch], vocab_size: int) -> np.ndarray:
    """How often each token is learned, int64 [V]."""
    counts = np.zeros((vocab_size,), np.int64)
    for batch in batches:
        labels = np.asarray(batch.labels)
        counts += np.bincount(labels[labels != IGNORED], minlength=vocab_size)
    return counts


def count_replies(rows: Iterable[dict[str, Any]], encode: Callable[[str], list[int]], vocab_size: int) -> np.ndarray:
    """How often each token occurs in the replies of rows of `messages`, int64 [V].

    A row that says which tokens its replies are, as "token_ids", is counted by these; others are encoded.
    """
    counts = np.zeros((vocab_size,), np.int64)
    for row in rows:
        replies = row.get("token_ids") or [encode(text) for text in _replies(row)]
        for ids in replies:
            counts += np.bincount(np.asarray(ids, np.int64), minlength=vocab_size)
    return counts


def _replies(row: dict[str, Any]) -> list[str]:
    messages = [message for message in row.get("messages", ()) if message.get("role") == "assistant"]
    return [message["content"] for message in messages if isinstance(message.get("content"), str)]


def draft_vocabulary(counts: np.ndarray, size: int) -> np.ndarray:
    """`d2t`, int64 [size]: from a draft id to the token id, for the most frequent tokens by counts [V], in their order.

    Of equally frequent tokens the first count. InputError if none was counted, or for more tokens than there are.
    """
    if not 1 <= size <= len(counts):
        raise InputError(f"a draft vocabulary of {size:,} tokens; the model has {len(counts):,}: ask for at most these")
    if not counts.any():
        raise InputError("no token of the data is learned, so there are none to draft; give data with replies")
    known = np.sort(np.argsort(-counts, kind="stable")[:size])
    return known - np.arange(size)
