"""What a training step reads: rows of tokens with labels, and the media in them.

Leaves are NumPy arrays on the host and arrays on devices in a step. Sizes are few, so that few programs are compiled. A
row may hold several samples, one after the other; no token sees another sample.
"""

from dataclasses import dataclass

import jax

from omni_jax.sharding import Array

# The label of a token that is not to be learned, as in transformers.
IGNORED = -100


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class MediaRows:
    """Media of the rows, arranged as `inputs.batch.Batch` has them.

    vision: groups of frames of one size, each patches float32 [R, P, patch_dim] and their grid int32 [R, 2]. audio: mel
    float32 [W, C, M, F], frames and width int32 [W, C] of the windows; None without sound. visual_index and audio_index
    int32 [B, T]: the feature that each token is, -1 for none.
    """

    vision: tuple[tuple[Array, Array], ...]
    audio: tuple[Array, Array, Array] | None
    visual_index: Array
    audio_index: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TextBatch:
    """Rows of tokens int32 [B, T] for the Thinker.

    labels int32 [B, T]: the token's own id where it is to be learned, else IGNORED; not shifted. position_ids float32
    [3, B, T] (time, height, width). first_seen int32 [B, T]: index in its row of the first token of the token's sample;
    a token of padding sees itself alone. media: pictures, videos and sounds; None for text alone.
    """

    token_ids: Array
    labels: Array
    position_ids: Array
    first_seen: Array
    media: MediaRows | None = None
