"""The sizes to which pictures and frames are resized, from their original size, the settings and the options.

Source: `fetch_image` and `fetch_video` of the official utilities with this model's patch size (image_patch_size=16),
after which the reference processor resizes nothing; without options, that processor alone. Videos always have the
utilities' bound on the pixels of all their frames: 115,200 tokens, or 300 frames of the largest size.
"""

from collections.abc import Sequence
from dataclasses import replace

from omni_jax.errors import InputError
from omni_jax.inputs.image import smart_resize
from omni_jax.inputs.options import Options
from omni_jax.inputs.settings import (
    PICTURE_MAX_TOKENS,
    PICTURE_MIN_TOKENS,
    VIDEO_TOTAL_TOKENS,
    ImageSettings,
    VideoSettings,
)


def picture_size(shape: Sequence[int], settings: ImageSettings, options: Options) -> tuple[int, int]:
    """The (height, width) of a resized picture, from its shape (height, width, ...)."""
    if options.resized_height is not None and options.resized_width is not None:
        return smart_resize(options.resized_height, options.resized_width, _stated_limits(settings), 1)
    if options.min_pixels is None and options.max_pixels is None:
        return smart_resize(shape[0], shape[1], settings)
    least = options.min_pixels or PICTURE_MIN_TOKENS * settings.factor**2
    most = options.max_pixels or max(settings.max_pixels, least)
    return _within(shape, settings, least, most, 1)


def frame_size(shape: Sequence[int], count: int, settings: VideoSettings, options: Options) -> tuple[int, int]:
    """The (height, width) of each of `count` resized frames; each has at most an equal share of all pixels."""
    if options.resized_height is not None and options.resized_width is not None:
        return smart_resize(options.resized_height, options.resized_width, _stated_limits(settings.frame), 1)
    frame = settings.frame
    stated = options.min_pixels or options.max_pixels or options.total_pixels
    least = options.min_pixels or frame.min_pixels
    total = options.total_pixels or VIDEO_TOTAL_TOKENS * frame.factor**2
    most = max(min(frame.max_pixels, total / count * frame.temporal_patch_size), int(least * 1.05))
    return _within(shape, frame, least, min(options.max_pixels or most, most), 1 if stated else 0)


def listed_frame_size(shape: Sequence[int], count: int, settings: VideoSettings, options: Options) -> tuple[int, int]:
    """As `frame_size`, for frames given as pictures: the utilities first round their sides to two merged tokens."""
    frame = settings.frame
    twice = replace(frame, merge_size=2 * frame.merge_size)
    if options.resized_height is not None and options.resized_width is not None:
        shape = smart_resize(options.resized_height, options.resized_width, _stated_limits(twice), 1)
    else:
        tokens = (PICTURE_MIN_TOKENS * twice.factor**2, PICTURE_MAX_TOKENS * twice.factor**2)
        least, most = options.min_pixels or tokens[0], options.max_pixels or tokens[1]
        shape = _within(shape, twice, least, most, 1)
    return frame_size(shape, count, settings, options)


def _stated_limits(settings: ImageSettings) -> ImageSettings:
    """The limits of a stated size."""
    area = settings.factor**2
    return replace(settings, min_pixels=PICTURE_MIN_TOKENS * area, max_pixels=PICTURE_MAX_TOKENS * area)


def _within(shape: Sequence[int], settings: ImageSettings, least: float, most: float, fewest: int) -> tuple[int, int]:
    if least > most:
        raise InputError(
            f"'max_pixels' is {most:g}, and there are at least {least:g}; state a smaller 'min_pixels' too"
        )
    return smart_resize(shape[0], shape[1], replace(settings, min_pixels=least, max_pixels=most), fewest)
