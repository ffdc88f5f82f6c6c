"""Three-dimensional rotary positions (time, height, width) of a prompt.

The last step of a prompt before the model: the token ids are complete, and each media item fills its run of
placeholders. Text counts 1, 2, 3 on all three axes, and so do the tokens of sound; the tokens of a picture, or of one
frame of a video, share a time and are spread over height and width; the next token continues after the largest
position. A video's time is counted in position ids, `position_id_per_seconds` of them per second, so it is fractional
in general. All in float32 and in the reference's order of operations, so that even the rounding is equal.

Source: HF `Qwen3OmniMoePreTrainedModelForConditionalGeneration.get_rope_index`. Deliberate differences:
- Each token's position follows from the kind of the token. The reference simulates the interleaving of sound and video
  a second time, in float32 and shifted by the row's position; where that rounds to another order than the one in which
  the processor wrote the tokens, it gives frames the positions of sounds.
- Whether a video has sound is a property of the video. The reference has one switch for all videos, with which silent
  videos are not counted and the media after them become plain text (VeOmni#493).
- Each row is processed alone, so that it has the same positions in any batch; counts that do not match are errors.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class MediaItem:
    """The size of one picture, sound or video in a prompt.

    kind: "image", "audio" or "video". grid: (time, height, width) in patches; None for sound. seconds_per_grid: the
    duration of one temporal step of a video. audio_tokens: the tokens of a sound, or of a video's own sound; else 0.
    """

    kind: str
    grid: Grid | None = None
    seconds_per_grid: float = 1.0
    audio_tokens: int = 0


@dataclass(frozen=True)
class _Run:
    """The placeholders of one item: tokens start to end - 1, with `marks` tokens before and after them.

    positions: float32 [3, end - start], beginning at 0. The token after the item continues after the largest position
    of the columns from `last` on, where the last frames or the last sound begin.
    """

    start: int
    end: int
    marks: int
    positions: np.ndarray
    last: int


def rope_positions(
    token_ids: np.ndarray, items: Sequence[MediaItem], config: ThinkerConfig
) -> tuple[np.ndarray, np.float32]:
    """Positions float32 [3, T] of an unpadded row of ids int [T], and rope_delta: the next token's position minus T.

    items: the row's media in order of appearance. Raises InputError if placeholders and items do not match.
    """
    pieces: list[np.ndarray] = []
    at, closing, position = 0, 0, np.float32(0)
    for run in _runs(np.asarray(token_ids), items, config):
        # Marks and text are counted one after another: a single sum over all of them would round differently.
        for count in (closing, run.start - run.marks - closing - at, run.marks):
            pieces.append(_counted(count) + position)
            position = position + np.float32(count)
        pieces.append(run.positions + position)
        position = np.max(pieces[-1][:, run.last :]) + np.float32(1)
        at, closing = run.end, run.marks
    for count in (closing, len(token_ids) - closing - at):
        pieces.append(_counted(count) + position)
        position = position + np.float32(count)
    positions = np.concatenate(pieces, axis=1)
    return positions, np.max(positions, initial=np.float32(-1)) + np.float32(1) - np.float32(len(token_ids))


def vision_positions(grid: Grid, seconds_per_grid: float, config: ThinkerConfig) -> np.ndarray:
    """Positions float32 [3, t * h * w / merge_size^2] of a picture or video, beginning at 0, frame by frame."""
    t, h, w = grid[0], grid[1] // config.vision.spatial_merge_size, grid[2] // config.vision.spatial_merge_size
    times = np.arange(t, dtype=np.float32) * np.float32(seconds_per_grid) * np.float32(config.position_id_per_seconds)
    axes = np.meshgrid(times, np.arange(h, dtype=np.float32), np.arange(w, dtype=np.float32), indexing="ij")
    return np.stack(axes).reshape(3, -1)


def items_at(
    token_ids: np.ndarray, items: Sequence[MediaItem], kept: np.ndarray, config: ThinkerConfig
) -> list[MediaItem]:
    """The media of an unpadded row of ids int [T] whose placeholders are `kept`, bool [T]; none may be kept in part.

    items: the row's media in order of appearance. Raises InputError if placeholders and items do not match.
    """
    bounds = _bounds(np.asarray(token_ids), items, config)
    return [item for (start, _), item in zip(bounds, items, strict=True) if kept[start]]


def _counted(count: int) -> np.ndarray:
    """0, 1, 2, ... on all three axes: float32 [3, count]."""
    return np.broadcast_to(np.arange(count, dtype=np.float32), (3, count))


def _runs(token_ids: np.ndarray, items: Sequence[MediaItem], config: ThinkerConfig) -> list[_Run]:
    """The media items of a row and their places; each uninterrupted run of placeholders is one."""
    runs: list[_Run] = []
    free = 0  # the first token after all runs so far
    for (start, end), item in zip(_bounds(token_ids, items, config), items, strict=True):
        marks = 2 if item.grid is not None and item.audio_tokens else 1
        opening = token_ids[max(start - marks, free) : start].tolist()
        if opening != _opening(item, config) or end + marks > len(token_ids):
            raise InputError(
                f"the {item.kind} at tokens {start} to {end - 1} is not between its start and end marks; "
                "the chat template does not fit Qwen3-Omni"
            )
        tokens = token_ids[start:end]
        changes = np.flatnonzero(np.diff(tokens))
        last = int(changes[-1]) + 1 if changes.size else 0
        runs.append(_Run(start, end, marks, _within(tokens, item, config), last))
        free = end + marks
    return runs


def _bounds(token_ids: np.ndarray, items: Sequence[MediaItem], config: ThinkerConfig) -> list[tuple[int, int]]:
    """Start and end of each uninterrupted run of placeholders; InputError unless each item has one."""
    placeholders = (config.image_token_id, config.video_token_id, config.audio_token_id)
    edges = np.diff(np.isin(token_ids, placeholders), prepend=False, append=False)
    bounds = np.flatnonzero(edges).reshape(-1, 2).tolist()
    if len(bounds) != len(items):
        given = dict(Counter(item.kind for item in items))
        raise InputError(f"the prompt has {len(bounds)} runs of placeholders for {len(items)} items of media: {given}")
    return [(start, end) for start, end in bounds]


def _opening(item: MediaItem, config: ThinkerConfig) -> list[int]:
    """The marks that precede an item."""
    vision = [config.vision_start_token_id] if item.grid is not None else []
    return vision + ([config.audio_start_token_id] if item.audio_tokens else [])


def _within(tokens: np.ndarray, item: MediaItem, config: ThinkerConfig) -> np.ndarray:
    """Positions float32 [3, n] of an item's placeholders int [n], beginning at 0."""
    visual = np.empty((3, 0), np.float32)
    if item.grid is not None:
        visual = vision_positions(item.grid, item.seconds_per_grid if item.kind == "video" else 1.0, config)
    is_visual = tokens == (config.video_token_id if item.kind == "video" else config.image_token_id)
    is_sound = tokens == config.audio_token_id
    found = (np.count_nonzero(is_visual), np.count_nonzero(is_sound))
    if found != (visual.shape[1], item.audio_tokens) or sum(found) != len(tokens):
        raise InputError(
            f"{len(tokens)} placeholders ({found[0]} visual, {found[1]} audio) for an "
            f"item of kind {item.kind!r} with {visual.shape[1]} visual and {item.audio_tokens} audio tokens"
        )
    positions = np.empty((3, len(tokens)), np.float32)
    positions[:, is_visual] = visual
    positions[:, is_sound] = _counted(item.audio_tokens)
    return positions
