"""The tokens that EAGLE-3 knows: the most frequent ones of what it is trained on, ends of replies among them."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.rows.row import plain_row
from omni_jax.train.batch import IGNORED, TextBatch


def count_learned(batches: Iterable[TextBatch], vocab_size: int) -> np.ndarray:
    """How often each token is learned, int64 [V]."""
    counts = np.zeros((vocab_size,), np.int64)
    for batch in batches:
        labels = np.asarray(batch.labels)
        counts += np.bincount(labels[labels != IGNORED], minlength=vocab_size)
    return counts


def count_rows(
    rows: Iterable[tuple[Path, Any]], learned: Callable[[dict[str, Any], Path], np.ndarray], vocab_size: int
) -> np.ndarray:
    """How often each token of rows of data is learned, int64 [V]; rows that cannot be used count nothing.

    rows: with the folder of the file of each. learned: the tokens int [n] of a row, from `data.samples.TextRecipe`.
    """
    counts = np.zeros((vocab_size,), np.int64)
    for folder, row in rows:
        # Those that cannot be used are reported when the data are read.
        with suppress(Exception):
            counts += np.bincount(learned(plain_row(row), folder), minlength=vocab_size)
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
