"""Packed rows and made-up hidden states of a target, for the losses of drafters."""

import jax.numpy as jnp
import numpy as np

from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.losses.target import Ends

# Samples of each row as (tokens, of which learned from this one on); what is left is padding.
PACKED = (((13, 4), (9, 2)), ((17, 6), (3, 2)))
LENGTH = 24


def packed(vocab_size: int, seed: int = 0) -> TextBatch:
    """Rows of LENGTH tokens with the samples of PACKED; one token in the middle of a reply is not learned."""
    rng = np.random.default_rng(seed)
    B = len(PACKED)
    token_ids = rng.integers(0, vocab_size, (B, LENGTH)).astype(np.int32)
    labels, first = np.full((B, LENGTH), IGNORED, np.int32), np.tile(np.arange(LENGTH, dtype=np.int32), (B, 1))
    for b, row in enumerate(PACKED):
        start = 0
        for tokens, learned in row:
            first[b, start : start + tokens] = start
            labels[b, start + learned : start + tokens] = token_ids[b, start + learned : start + tokens]
            start += tokens
    labels[1, 10] = IGNORED
    position = np.broadcast_to((np.arange(LENGTH) - first).astype(np.float32), (3, B, LENGTH))
    return TextBatch(token_ids, labels, position, first)


def states(n: int, D: int, seed: int = 1) -> jnp.ndarray:
    """Hidden states [B, LENGTH, n * D] of the rows of `packed`."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((len(PACKED), LENGTH, n * D)), jnp.float32)


def ends(vocab_size: int, D: int, seed: int = 2) -> Ends:
    """An embedding and a head of a target."""
    rng = np.random.default_rng(seed)
    embed, head = rng.standard_normal((2, vocab_size, D))
    return Ends(jnp.asarray(0.7 * embed, jnp.float32), jnp.asarray(2 * D**-0.5 * head, jnp.float32))
