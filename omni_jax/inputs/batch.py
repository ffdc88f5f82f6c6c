"""The prepared batch, and the packing of ragged media into few static shapes.

Data flow: `image`, `video` and `audio` make the patches or the mel spectrogram of each item; here they are arranged in
rows of bucketed sizes, zero padded, so that any mixture of media compiles a bounded number of programs. A vision row is
one frame, an audio row one attention window: nothing attends across rows, so the layout itself keeps segments apart. A
placeholder finds its embedding by an index (`Batch.visual_index`, `Batch.audio_index`) into the encoders' flat outputs.

Source: the segments are those of transformers `Qwen3OmniMoeVisionEncoder` (cu_seqlens, one per frame) and
`Qwen3OmniMoeAudioEncoder` (windows of `n_window_infer` frames). Deliberate difference: the reference pads a short clip
to the longest chunk of the whole call, so that its result depends on its neighbours; here each clip keeps its own
width, as if it were alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from omni_jax.config import AudioConfig
from omni_jax.errors import InputError
from omni_jax.inputs.audio import TOKENS_PER_CHUNK, token_count
from omni_jax.inputs.positions import Grid, MediaItem

# Rounds up a number of rows, so that there are few.
Count = Callable[[int], int]
# Where few sizes matter more than padding: the fewest rows, and the sizes of frames in merged tokens.
LEAST_COARSE, COARSE_FRAMES = 32, (16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True, eq=False)
class VisionRows:
    """A group of R frames of one bucketed size.

    patches: float32 [R, P, patch_dim]; a row is one frame (one temporal grid step), in merge-block order.
    grid: int32 [R, 2], height and width in patches; (0, 0) for a row of padding.
    Within the group, merged token j of row r has the index r * (P / merge_size^2) + j.
    """

    patches: np.ndarray
    grid: np.ndarray


@dataclass(frozen=True, eq=False)
class AudioWindows:
    """Attention windows of mel chunks; each clip starts a new window and fills its windows from the front.

    mel: float32 [W, C, M, F]. frames: int32 [W, C], valid frames of a chunk; 0 for padding.
    width: int32 [W, C], frames that the convolutions see before their own padding begins: F, but the clip's own frame
    count for a clip shorter than one chunk; 0 for padding.
    Token j of chunk c in window w has the index (w * C + c) * 13 + j.
    """

    mel: np.ndarray
    frames: np.ndarray
    width: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """All inputs of the Thinker, in NumPy, and what the Talker's prompt is made of.

    token_ids: int32 [B, T]. mask: bool [B, T]. position_ids: float32 [3, B, T] (time, height, width).
    rope_delta: float32 [B]; the position of the next token is the row's length + rope_delta.
    vision: groups of frames, by size. audio: windows of all clips; None without clips.
    visual_index: int32 [B, T], index into the merged tokens of all groups, one group after the other; -1 elsewhere.
    audio_index: int32 [B, T], index into the tokens of the windows; -1 elsewhere.
    items: the media of each row in order of appearance; empty for a batch without media.
    """

    token_ids: np.ndarray
    mask: np.ndarray
    position_ids: np.ndarray
    rope_delta: np.ndarray
    vision: tuple[VisionRows, ...]
    visual_index: np.ndarray
    audio: AudioWindows | None
    audio_index: np.ndarray
    items: tuple[tuple[MediaItem, ...], ...] = ()

    def __repr__(self) -> str:
        B, T = self.token_ids.shape
        frames, windows = sum(len(rows.grid) for rows in self.vision), 0 if self.audio is None else len(self.audio.mel)
        return f"Batch(token_ids [{B}, {T}], {frames} rows of patches, {windows} audio windows)"

    @classmethod
    def of_text(cls, token_ids: ArrayLike) -> Self:
        """Rows of plain tokens int32 [B, T], without media and without padding."""
        ids = np.asarray(token_ids, np.int32)
        B, T = ids.shape
        return cls(
            token_ids=ids,
            mask=np.ones((B, T), bool),
            position_ids=np.tile(np.arange(T, dtype=np.float32), (3, B, 1)),
            rope_delta=np.zeros(B, np.float32),
            vision=(),
            visual_index=np.full((B, T), -1, np.int32),
            audio=None,
            audio_index=np.full((B, T), -1, np.int32),
        )


def bucket(n: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least n, and at most 1.5 n."""
    if n < 1:
        raise ValueError(f"bucket of {n}; sizes start at 1")
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def coarse_bucket(n: int) -> int:
    """The smallest of 32, 64, 128, ... that is at least n: fewer sizes than `bucket` has."""
    return max(LEAST_COARSE, 1 << (n - 1).bit_length())


def pack_vision(
    items: Sequence[tuple[np.ndarray, Grid]], merge_size: int, row_tokens: Sequence[int] = (), count: Count = bucket
) -> tuple[tuple[VisionRows, ...], list[np.ndarray]]:
    """Arrange pictures and videos, each (patches float32 [t*h*w, patch_dim], (t, h, w)), in groups of bucketed rows.

    row_tokens: the sizes that rows may have, in merged tokens; a frame takes the smallest that holds it. By default,
    and for a frame larger than all of them, its own bucket. count: rounds up the number of rows.
    Returns the groups, and for each item the indices int32 [t*h*w / merge_size^2] of its merged tokens, frame by frame.
    Raises InputError for patches that do not fit their grid.
    """
    merge = merge_size**2
    frames: dict[int, list[tuple[int, int]]] = defaultdict(list)  # tokens per row -> (item, frame)
    for i, (patches, (t, h, w)) in enumerate(items):
        if min(t, h, w) < 1 or h % merge_size or w % merge_size or len(patches) != t * h * w:
            raise InputError(f"picture {i}: {len(patches)} patches do not fit a grid of {(t, h, w)}")
        own = bucket(h * w // merge)
        frames[min((size for size in row_tokens if size >= own), default=own)] += [(i, frame) for frame in range(t)]
    groups, base = [], 0
    indices = [np.empty((t, h * w // merge), np.int32) for _, (t, h, w) in items]
    for tokens, members in sorted(frames.items()):
        R = count(len(members))
        rows = VisionRows(
            patches=np.zeros((R, tokens * merge, items[0][0].shape[1]), np.float32), grid=np.zeros((R, 2), np.int32)
        )
        for r, (i, frame) in enumerate(members):
            patches, (_, h, w) = items[i]
            rows.patches[r, : h * w] = patches[frame * h * w : (frame + 1) * h * w]
            rows.grid[r] = h, w
            indices[i][frame] = base + r * tokens + np.arange(h * w // merge)
        groups.append(rows)
        base += R * tokens
    return tuple(groups), [index.reshape(-1) for index in indices]


def pack_audio(
    mels: Sequence[np.ndarray], config: AudioConfig, count: Count = bucket
) -> tuple[AudioWindows | None, list[np.ndarray]]:
    """Arrange clips, each float32 [M, frames], in attention windows of `config.window_chunks` chunks.

    count: rounds up the number of windows.
    Returns the windows (None without clips), and for each clip the indices int32 [tokens] of its tokens, in order.
    Raises InputError for a spectrogram of another shape.
    """
    F, M = config.chunk_frames, config.mel_bins
    for i, mel in enumerate(mels):
        if mel.ndim != 2 or mel.shape[0] != M or mel.shape[1] < 1:
            raise InputError(f"audio {i}: a mel spectrogram of shape {mel.shape}; the model takes ({M}, frames)")
    if not mels:
        return None, []
    chunks = [-(-mel.shape[1] // F) for mel in mels]
    C = min(config.window_chunks, bucket(max(chunks)))
    starts = np.cumsum([0] + [-(-n // C) for n in chunks])  # each clip's first window
    W = count(int(starts[-1]))
    flat = np.zeros((W * C, M, F), np.float32)
    frames, width = np.zeros(W * C, np.int32), np.zeros(W * C, np.int32)
    indices = []
    for mel, n, first in zip(mels, chunks, starts[:-1] * C, strict=True):
        total = mel.shape[1]
        padded = np.pad(mel, ((0, 0), (0, n * F - total))).reshape(M, n, F)
        flat[first : first + n] = padded.swapaxes(0, 1)
        frames[first : first + n] = np.minimum(F, total - F * np.arange(n))
        width[first : first + n] = min(F, total)
        indices.append((first * TOKENS_PER_CHUNK + np.arange(token_count(total, F))).astype(np.int32))
    return AudioWindows(flat.reshape(W, C, M, F), frames.reshape(W, C), width.reshape(W, C)), indices
