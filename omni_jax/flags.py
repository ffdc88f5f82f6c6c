"""Flags: the settings as the command line takes them, in groups that commands contain.

Names, defaults and meanings are those of `settings`. What differs is stated here: flags that may be repeated, settings
without a flag, and the options of media. Values are not checked when they are parsed, since the parser takes a
ValueError for wrong usage; `Settings.read` checks them.
"""

from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Suppress, UseAppendAction

from omni_jax.distributed import Machines
from omni_jax.files import user_path
from omni_jax.settings import Ending, Preparation, Sampling, Voice


class _Unchecked:
    """What a parser makes without checks."""

    def __post_init__(self) -> None:
        """Leave the values as they were typed."""


@dataclass(frozen=True)
class MediaFlags:
    """How pictures, sounds and videos are resized, sampled and cut, where their messages do not say so."""

    min_pixels: float | None = None
    """Least area of a resized picture or frame, in pixels; a token is 1024."""
    max_pixels: float | None = None
    """Largest area of a resized picture or frame."""
    resized_height: int | None = None
    """Height of resized pictures and frames, rounded to tokens; goes with --resized-width."""
    resized_width: int | None = None
    """Width of resized pictures and frames, rounded to tokens; goes with --resized-height."""
    nframes: int | None = None
    """Frames taken of a video, in place of --fps."""
    min_video_frames: int | None = None
    """Fewest frames taken of a video at --fps."""
    max_video_frames: int | None = None
    """Most frames taken of a video at --fps."""
    total_pixels: float | None = None
    """Most pixels of all frames of a video."""
    video_start: float | None = None
    """Seconds into a video at which to begin."""
    video_end: float | None = None
    """Seconds into a video at which to end."""
    audio_start: float | None = None
    """Seconds into a sound at which to begin."""
    audio_end: float | None = None
    """Seconds into a sound at which to end."""

    def options(self) -> dict[str, Any]:
        """What is stated, by the names of options in messages."""
        # --max-frames limits speech.
        stated = {name.replace("_video_frames", "_frames"): value for name, value in vars(self).items()}
        return {name: value for name, value in stated.items() if value is not None}


@dataclass(frozen=True)
class PreparationFlags(_Unchecked, Preparation):
    """How messages and their media become a prompt."""

    tools: Suppress[None] = None
    media: Suppress[None] = None


@dataclass(frozen=True)
class EndingFlags(_Unchecked, Ending):
    """Where replies end."""

    stop: UseAppendAction[tuple[str, ...]] = ()
    """A text that ends the reply, which does not show it; repeat the flag for more."""
    stop_ids: Suppress[None] = None


@dataclass(frozen=True)
class SamplingFlags(_Unchecked, Sampling):
    """How tokens are drawn."""

    logprobs: Suppress[None] = None
    seed: int = 0
    """A reply follows from its prompt, settings and seed alone."""


@dataclass(frozen=True)
class VoiceFlags(_Unchecked, Voice):
    """How replies are spoken."""

    speaker: str = "ethan"
    """Whose voice; `inspect` lists the checkpoint's."""


@dataclass(frozen=True)
class DeviceFlags(Machines):
    """The devices that hold the model, and the processes that share it."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Weights' type; by default the checkpoint's own, on CPU float32."""
    quantize: Literal["int8"] | None = None
    """Hold the routed experts in eight bits."""


def keywords_of(media: MediaFlags, *groups: Any) -> dict[str, Any]:
    """What groups of flags hold, by name, and the options of media, as keywords for `Settings.read`."""
    return {name: value for group in groups for name, value in vars(group).items()} | {"media": media.options()}


def expand_paths(flags: Any) -> Any:
    """Flags with `~` expanded in their paths, wherever the shell did not do so, as in --model=~/model."""
    return replace(flags, **{name: _expanded(value, f"--{name}") for name, value in vars(flags).items()})


def _expanded(value: Any, flag: str) -> Any:
    if is_dataclass(value):
        return expand_paths(value)
    if isinstance(value, tuple):
        return tuple(_expanded(one, flag) for one in value)
    return user_path(value, flag) if isinstance(value, Path) else value
