"""The tokens that EAGLE-3 knows: the most frequent ones of the replies that it is trained on."""

from collections.abc import Iterable

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
