"""A batch of text as people read it, with what is learned in brackets."""

from itertools import groupby, pairwise

import numpy as np

from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.objective import Step

# Around what is learned; and how often a token may repeat before it is counted instead, as placeholders of media are.
LEARNED, MAX_REPEATED = "⟦{}⟧", 3


def masked_text(step: Step, tokenizer: Tokenizer) -> str:
    """The samples of a `TextBatch`, one below the other, each with its row and its tokens that are learned in brackets.

    Padding is left out, and a token that repeats is written once, with how often it occurs.
    """
    batch, texts = step.batch, []
    assert isinstance(batch, TextBatch)
    for token_ids, labels, first_seen in zip(
        *map(np.asarray, (batch.token_ids, batch.labels, batch.first_seen)), strict=True
    ):
        starts = [*np.flatnonzero(first_seen == np.arange(len(first_seen))), len(first_seen)]
        for start, end in pairwise(starts):
            if end - start > 1:  # a single token is padding
                texts.append(_sample(token_ids[start:end], labels[start:end], tokenizer))
    names = [*step.samples, *[""] * (len(texts) - len(step.samples))]
    return "\n\n".join(f"{name}\n{text}" for name, text in zip(names, texts, strict=False))


def _sample(token_ids: np.ndarray, labels: np.ndarray, tokenizer: Tokenizer) -> str:
    """A sample's tokens int [T] as text, those that have a label in brackets."""
    pieces = []
    pairs = zip(token_ids.tolist(), labels.tolist(), strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = _decoded([token for token, _ in group], tokenizer)
        pieces.append(LEARNED.format(text) if learned else text)
    return "".join(pieces)


def _decoded(token_ids: list[int], tokenizer: Tokenizer) -> str:
    """Tokens as text, in which special tokens are written out."""
    pieces: list[str] = []
    plain: list[int] = []
    for token, group in groupby(token_ids):
        count = len([*group])
        if count <= MAX_REPEATED:
            plain += [token] * count
            continue
        pieces.append(tokenizer.decode(plain, skip_special=False))
        pieces.append(f"{tokenizer.decode([token], skip_special=False)}×{count}")
        plain = []
    return "".join([*pieces, tokenizer.decode(plain, skip_special=False)])
