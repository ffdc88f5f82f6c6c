"""The Thinker's batches, of what worker processes have prepared."""

import numpy as np

from omni_jax.train.batch import IGNORED, MediaRows, TextBatch
from omni_jax.train.data.samples import PackedRows


def text_batch(packed: PackedRows) -> TextBatch:
    """Rows of samples as the batch of a training step, on the host."""
    return TextBatch(
        token_ids=packed.token_ids,
        labels=np.where(packed.learned, packed.token_ids, np.int32(IGNORED)),
        position_ids=packed.position_ids,
        first_seen=packed.first_seen,
        media=None if packed.media is None else MediaRows(*packed.media),
    )
