"""Moving pictures: from a file to rows of patches, one row of the encoder per pair of frames, and their sound track.

Data flow: `load_video` decodes and samples frames, `patchify_video` cuts them into patches; `video_audio` gives the
sound of the same file on the same clock, for `audio.log_mel`.

Source: transformers `Qwen2VLVideoProcessor` with the settings of `Qwen3OmniMoeProcessor`: its sampling (a multiple of
the temporal patch, `min_frames` to `max_frames`, evenly from the start), the size limits of a frame, and its patches.
Deliberate differences:
- The reference states 2 / fps seconds per grid step with the caller's fps or 1.0, whatever the file holds; here the
  step is measured, duration / sampled frames x 2. An array with its fps gives the reference's figure.
- The reference samples by frame number; here by time stamp, so that a variable frame rate keeps its clock. At a
  constant rate both pick the same frames.
- Frames are resized by PIL, as pictures are, where the reference uses torchvision: at most 1/255 apart on natural
  pictures. Its optional bound on a whole video's pixels (`cap_pixels_per_frame`, off by default) is not applied.
- The rotation that a phone notes in the file is applied, and damaged or cut files are errors.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs import audio, image
from omni_jax.inputs.settings import CHANNELS, VideoSettings
from omni_jax.inputs.source import Source, demux, is_source, name_of, open_container

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_SECONDS = 4 * 3600.0
MAX_WALL_SECONDS = 600.0
MAX_FRAME_PIXELS = 8192 * 4320
MIN_RATE, MAX_RATE = 1 / 120, 1000.0  # frames per second, on average; a file outside is damaged or malicious
STAMP_SLACK = 1e-3  # seconds; Matroska rounds its time stamps to milliseconds


@dataclass(frozen=True)
class VideoLimits:
    """What `load_video` takes on before it gives up: playing time, its own time, and the pixels of a decoded frame."""

    seconds: float = MAX_SECONDS
    wall_seconds: float = MAX_WALL_SECONDS
    frame_pixels: int = MAX_FRAME_PIXELS


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled frames: uint8 [T, H, W, 3], their rate in frames per second, and the whole's duration in seconds."""

    frames: np.ndarray
    fps: float
    duration: float


def check_fps(fps: float | None) -> None:
    """Raise InputError unless `fps` is a rate at which a video can be sampled, or None for the settings' own."""
    if fps is not None and not (isinstance(fps, int | float | np.number) and MIN_RATE <= fps <= MAX_RATE):
        raise InputError(f"video fps {fps}; give frames per second between {MIN_RATE:.3f} and {MAX_RATE:.0f}")


def load_video(
    source: Source | np.ndarray, settings: VideoSettings, fps: float | None = None, limits: VideoLimits = VideoLimits()
) -> Video:
    """Load a video: sample a file or bytes at `fps` (default: the settings'), or take an array as it is.

    An array is uint8 [T, H, W, 3], already sampled at its `fps`. Frames of a file come resized to whole merged tokens,
    so that a long one fits in memory. Raises InputError for what cannot be read, is damaged, or exceeds `limits`.
    """
    check_fps(fps)
    if isinstance(source, np.ndarray):
        if fps is None:
            raise InputError("video array without fps; give the rate at which its frames were sampled")
        return Video(_check_array(source, settings, limits), float(fps), len(source) / fps)
    if not is_source(source):
        raise InputError(f"video {name_of(source)}: pass a path, bytes, or a NumPy array with its fps")
    what, deadline = f"video {name_of(source)}", time.monotonic() + limits.wall_seconds
    with open_container(source, "video") as container:
        count, duration = _measure(container, what, limits, deadline)
    n = sample_count(count, duration, settings, fps or settings.frames_per_second)
    with open_container(source, "video") as container:
        frames = _decode(container, what, duration * np.arange(n) / n, settings, limits, deadline)
    return Video(frames, n / duration, duration)


def _check_array(frames: np.ndarray, settings: VideoSettings, limits: VideoLimits) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != CHANNELS or not frames.size:
        raise InputError(f"video array of {frames.dtype} {frames.shape}; pass uint8 [T, H, W, 3], values 0 to 255")
    if len(frames) > settings.max_frames:
        raise InputError(f"video array of {len(frames)} frames; sample it down to {settings.max_frames} at a lower fps")
    if frames.shape[1] * frames.shape[2] > limits.frame_pixels:
        raise InputError(f"video array of {frames.shape[2]} x {frames.shape[1]} pixels; make it smaller")
    return frames


def _stream(container: "InputContainer", what: str, limits: VideoLimits) -> "VideoStream":
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise InputError(f"{what}: it holds no moving pictures; sound goes in as audio, a picture as an image")
    pixels = streams[0].codec_context.width * streams[0].codec_context.height
    if pixels > limits.frame_pixels:
        raise InputError(f"{what}: frames of {pixels} pixels, more than {limits.frame_pixels}; scale it down")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _measure(container: "InputContainer", what: str, limits: VideoLimits, deadline: float) -> tuple[int, float]:
    """Count the frames and measure their duration in seconds from time stamps, without decoding."""
    stream = _stream(container, what, limits)
    count, stamps = 0, []
    for packet in demux(container, stream, what):
        if packet.size and not packet.is_discard:
            count += 1
            stamp = packet.dts if packet.pts is None else packet.pts
            stamps += [] if stamp is None else [(stamp, packet.duration or 0)]
            _check_time(what, deadline)
    if not stamps:
        raise InputError(f"{what}: it holds no frames, or none with a time stamp; put the stream in an MP4 file")
    (first, _), (last, length) = min(stamps), max(stamps)
    length = length or (last - first) / max(count - 1, 1)  # of the last frame
    duration = float((last - first + length) * (stream.time_base or 0))
    if not duration or not MIN_RATE <= count / duration <= MAX_RATE:
        raise InputError(f"{what}: {count} frames in {duration:g} s; its time stamps are damaged: re-encode it")
    if duration > limits.seconds:
        raise InputError(f"{what}: {duration:.0f} s is longer than {limits.seconds:.0f} s; cut it into parts")
    return count, duration


def _check_time(what: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise InputError(f"{what}: decoding takes too long; cut it into parts, or scale it down")


def sample_count(count: int, duration: float, settings: VideoSettings, fps: float) -> int:
    """How many of `count` frames to take for `fps` a second: a multiple of the temporal patch, but never none."""
    T = settings.frame.temporal_patch_size
    most = min(settings.max_frames, count)
    wanted = max(round(duration * fps, 2), settings.min_frames)  # 7.998 frames are 8 whose stamps were rounded
    return max(int(min(wanted, most)) // T * T, min(T, most))


def _decode(
    container: "InputContainer",
    what: str,
    times: np.ndarray,
    settings: VideoSettings,
    limits: VideoLimits,
    deadline: float,
) -> np.ndarray:
    """The frames on display at `times` (seconds from the first frame, ascending), resized: uint8 [T, H, W, 3]."""
    frames: list[np.ndarray] = []
    shown = None
    for frame, seconds in _timed_frames(container, what, limits, deadline):
        while shown is not None and len(frames) < len(times) and times[len(frames)] < seconds - STAMP_SLACK:
            frames.append(_to_rgb(shown, frames, settings))
        shown = frame
        if len(frames) == len(times):
            break
    if shown is None:
        raise InputError(f"{what}: none of its frames could be decoded")
    while len(frames) < len(times):
        frames.append(_to_rgb(shown, frames, settings))
    return np.stack(frames)


def _timed_frames(
    container: "InputContainer", what: str, limits: VideoLimits, deadline: float
) -> Iterator[tuple["VideoFrame", float]]:
    """Decoded frames and their seconds from the first one."""
    start = None
    for frame in container.decode(_stream(container, what, limits)):
        _check_time(what, deadline)
        if frame.is_corrupt or frame.time is None:
            raise InputError(f"{what}: a damaged frame; re-encode it")
        if frame.width * frame.height > limits.frame_pixels:
            raise InputError(f"{what}: frames of {frame.width} x {frame.height} pixels; scale it down")
        start = frame.time if start is None else start
        yield frame, frame.time - start


def _to_rgb(frame: "VideoFrame", earlier: list[np.ndarray], settings: VideoSettings) -> np.ndarray:
    """A decoded frame, upright and resized as the first one was: uint8 [H, W, 3]."""
    pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
    return image.resize(pixels, *earlier[0].shape[:2]) if earlier else image.fit(pixels, settings.frame)


def patchify_video(video: Video, settings: VideoSettings) -> tuple[np.ndarray, tuple[int, int, int], float]:
    """Cut a video into patches float32 [t * h * w, patch_dim], their grid (t, h, w), and the seconds of a grid step.

    The last frame is repeated to a multiple of the temporal patch.
    """
    T = settings.frame.temporal_patch_size
    frames = [image.fit(frame, settings.frame) for frame in video.frames]
    frames += [frames[-1]] * (-len(frames) % T)
    patches, grid = image.patchify_frames(np.stack(frames), settings.frame)
    return patches, grid, T / video.fps


def video_audio(source: Source, max_seconds: float = audio.MAX_SECONDS) -> np.ndarray | None:
    """The sound track of a video, float32 [samples], mono at 16 kHz; None when there is none, or only an instant.

    Sample 0 is the moment of the first frame: sound that starts later is preceded by silence, earlier sound is cut.
    """
    what = f"video {name_of(source)}"
    with open_container(source, "video") as container:
        pictures = _stream(container, what, VideoLimits())
        if not container.streams.audio:
            return None
        first = float((pictures.start_time or 0) * (pictures.time_base or 0))
        samples, rate, start = audio.read_track(container, what, max_seconds)
    lead = round((start - first) * rate)
    samples = np.pad(samples, (max(lead, 0), 0))[max(-lead, 0) :]
    if samples.size:
        audio.check_samples(what, samples)
        samples = audio.resample(samples, rate)
    return samples if samples.size >= audio.MIN_SAMPLES else None
