"""Flags of media options, for all pictures, sounds and videos of a command; names as in parts of messages."""

from dataclasses import dataclass
from typing import Any


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
    audio_start: float | None = None
    """Seconds into a sound at which to begin."""
    audio_end: float | None = None

    def options(self) -> dict[str, Any]:
        """What is stated, by the names of options in messages."""
        # --max-frames is taken by speech.
        stated = {name.replace("_video_frames", "_frames"): value for name, value in vars(self).items()}
        return {name: value for name, value in stated.items() if value is not None}
