"""The batches that the Talker is trained on, of what `talker_data` has prepared."""

from dataclasses import dataclass

import jax
import numpy as np

from omni_jax.inputs.speech import SpeechPrompt
from omni_jax.sharding import Array
from omni_jax.train.batch import MediaRows
from omni_jax.train.talker_data import SpokenRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ThinkerRows:
    """Prompts with media, of which the Thinker makes hidden states for the Talker.

    token_ids int32 [B, T]. position_ids float32 [3, B, T]. first_valid int32 [B]: the first token that is no padding.
    """

    token_ids: Array
    position_ids: Array
    first_valid: Array
    media: MediaRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SpeechBatch:
    """B rows that speak, of F frames; rows of padding have an empty prompt and no frame.

    prompt: the Talker's, of U columns, padded on the left. text_ids int32 [B, F]: the token that each frame adds to its
    codes. codes int32 [B, Q, F]; -1 behind the end of a row. thinker: the Thinker's prompts; None without media.
    hidden [B, T, D]: the hidden states of them, if they were made before.
    """

    prompt: SpeechPrompt
    text_ids: Array
    codes: Array
    thinker: ThinkerRows | None = None
    hidden: Array | None = None


def speech_batch(rows: SpokenRows) -> SpeechBatch:
    """Rows of samples as the batch of a training step, on the host."""
    batch, thinker = rows.thinker, None
    if batch is not None:
        vision = tuple((group.patches, group.grid) for group in batch.vision)
        audio = None if batch.audio is None else (batch.audio.mel, batch.audio.frames, batch.audio.width)
        thinker = ThinkerRows(
            token_ids=batch.token_ids,
            position_ids=batch.position_ids,
            first_valid=np.argmax(batch.mask, axis=1).astype(np.int32),
            media=MediaRows(vision, audio, batch.visual_index, batch.audio_index),
        )
    return SpeechBatch(rows.prompt, rows.text_ids, rows.codes, thinker)
