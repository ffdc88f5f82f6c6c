"""The batches that the Talker is trained on, of what `talker_data` has prepared."""

from dataclasses import dataclass
from zlib import crc32

import jax
import numpy as np

from omni_jax.inputs.speech import SpeechPrompt
from omni_jax.sharding import Array
from omni_jax.train.batch import MediaRows
from omni_jax.train.talker_data import SpokenRows

# How often the first code of a frame is misread, of how often others are: it is the one that is mostly drawn right.
FIRST = 0.15


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
    hidden [B, T, D]: the hidden states of them, if they were made before. read: what the Talker reads in place of the
    codes, in their form; None if it reads them as they are.
    """

    prompt: SpeechPrompt
    text_ids: Array
    codes: Array
    thinker: ThinkerRows | None = None
    hidden: Array | None = None
    read: Array | None = None


def speech_batch(rows: SpokenRows, mistakes: float = 0.0) -> SpeechBatch:
    """Rows of samples as the batch of a training step, on the host; mistakes: the share of codes that are misread."""
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
    read = misread(rows.codes, mistakes) if mistakes else None
    return SpeechBatch(rows.prompt, rows.text_ids, rows.codes, thinker, read=read)


def misread(codes: np.ndarray, share: float) -> np.ndarray:
    """Codes int32 [B, Q, F] of which about this share are those of other frames, the same for the same codes.

    Of first codes, it is `FIRST` of that share. What is behind the end of a row stays.
    """
    draw = np.random.default_rng(crc32(codes.tobytes()))
    found = codes.copy()
    for q in range(codes.shape[1]):
        real = codes[:, q] >= 0
        wrong = real & (draw.random(real.shape) < share * (FIRST if q == 0 else 1))
        found[:, q][wrong] = draw.choice(codes[:, q][real], int(wrong.sum())) if wrong.any() else 0
    return found
