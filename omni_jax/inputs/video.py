"""Videos: from a file to rows of patches, one row of the encoder per pair of frames, and their sound track.

Data flow: `plan_video` finds out, without decoding, how many frames will be taken, and their size; `VideoPlan.load`
decodes them (`timeline`), `patchify_video` cuts them into patches; `video_audio` returns the sound of the same file on
the same clock, for `audio.log_mel`.

Source: transformers `Qwen2VLVideoProcessor` with the settings of `Qwen3OmniMoeProcessor`: its sampling (a multiple of
the temporal patch, `min_frames` to `max_frames`, evenly from the start), the size limits of a frame, and its patches;
for options, the model's official utilities (see `sizes`). Deliberate differences:
- The reference states 2 / fps seconds per grid step with the caller's fps or 1.0, whatever the file holds; here the
  step is measured, duration / sampled frames x 2. For an array with its fps, both are equal.
- The reference samples by frame number; here frames are sampled by time stamp, so that a variable frame rate keeps its
  clock. At a constant rate both pick the same frames. The utilities spread frames from the first to the last; here that
  holds for `nframes`, while `fps` is a clock that starts with the first frame.
- Frames are resized by PIL, as pictures are, where the reference uses torchvision: they differ by at most 1/255 on
  natural pictures.
- The rotation that a phone notes in the file is applied, and damaged or truncated files are errors; damage to frames
  that are not taken is not noticed.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs import audio, image
from omni_jax.inputs.options import UNSTATED, Options
from omni_jax.inputs.settings import CHANNELS, VideoSettings
from omni_jax.inputs.sizes import frame_size, listed_frame_size
from omni_jax.inputs.source import Source, name_of, open_container
from omni_jax.inputs.timeline import (
    LIMITS,
    MAX_RATE,
    MIN_RATE,
    Bounds,
    Choice,
    Timeline,
    VideoLimits,
    choose,
    decode_all,
    decode_at,
    read_timeline,
    sample_count,
    stated_length,
    video_stream,
)

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

Frames = np.ndarray | list | tuple  # one array, or a list of pictures
RESIZERS = 8  # the most threads; each may hold a frame of 100 MB
LIST_FPS = 2.0  # the rate that the utilities assume for a list of frames
# Options that have no meaning for frames that are sampled already.
SAMPLING = ("nframes", "min_frames", "max_frames", "video_start", "video_end")


@dataclass(frozen=True, eq=False)
class Video:
    """Sampled and resized frames: uint8 [T, H, W, 3], their rate per second, and the seconds that they cover."""

    frames: np.ndarray
    fps: float
    duration: float


@dataclass(frozen=True, eq=False)
class VideoPlan:
    """A video before its frames are decoded: `count` frames of `size` (height, width); `load` decodes them.

    The size is computed from the header, which ignores rotation; that of the loaded frames is the true one.
    """

    count: int
    size: tuple[int, int]
    load: Callable[[], Video]

    def tokens(self, settings: VideoSettings) -> int:
        """The number of tokens of all frames."""
        steps = -(-self.count // settings.frame.temporal_patch_size)
        return steps * (self.size[0] // settings.frame.factor) * (self.size[1] // settings.frame.factor)


def check_fps(fps: float | None) -> None:
    """Raise InputError unless `fps` is a rate at which a video can be sampled, or None for that of the settings."""
    if fps is not None and not (isinstance(fps, int | float | np.number) and MIN_RATE <= fps <= MAX_RATE):
        raise InputError(f"video fps {fps}; give frames per second between {MIN_RATE:.3f} and {MAX_RATE:.0f}")


def load_video(
    source: Source | Frames,
    settings: VideoSettings,
    fps: float | None = None,
    limits: VideoLimits = LIMITS,
    options: Options = UNSTATED,
) -> Video:
    """Load a video: sample a file or bytes at `fps` (default: that of the settings), or take frames as they are.

    Frames are an array uint8 [T, H, W, 3] or a list of pictures, already sampled at `fps`. All are resized to whole
    merged tokens. Raises InputError for a video that cannot be read, is damaged, or exceeds `limits`.
    """
    return plan_video(source, settings, fps, limits, options).load()


def plan_video(
    source: Source | Frames,
    settings: VideoSettings,
    fps: float | None = None,
    limits: VideoLimits = LIMITS,
    options: Options = UNSTATED,
    room: int | None = None,
) -> VideoPlan:
    """The plan of what `load_video` will return; arguments and errors are the same.

    room: the most tokens of a file, which is refused before it is read if its header states more; None for no bound.
    """
    check_fps(fps)
    check_fps(options.fps)
    if isinstance(source, np.ndarray | list | tuple):
        return _plan_frames(source, settings, fps or options.fps, limits, options)
    if not isinstance(source, Source):
        raise InputError(f"video {name_of(source)}: pass a path, bytes, a list of frames, or an array with its fps")
    if fps is not None:
        options = Options(fps=fps).over(options)
    bounds = Bounds(f"video {name_of(source)}", limits)
    with open_container(source, "video") as container:
        if room is not None and (stated := stated_plan(container, settings, options, bounds)):
            check_room(stated, settings, bounds.what, room)
        timeline = read_timeline(container, bounds)
    choice = choose(timeline, settings, options, bounds.what)
    count = len(choice.times)

    def load() -> Video:
        frames = _decoded(source, timeline, choice, settings, options, Bounds(bounds.what, limits))
        return Video(frames, choice.fps, choice.duration)

    return VideoPlan(count, frame_size(timeline.shape, count, settings, options), load)


def stated_plan(
    container: "InputContainer", settings: VideoSettings, options: Options, bounds: Bounds
) -> VideoPlan | None:
    """The plan that follows from a file's header, without reading the file; None where it does not state enough."""
    stated = stated_length(container, bounds)
    if stated is None or options.video_start is not None or options.video_end is not None:
        return None
    count, duration, shape = stated
    fps = options.fps or settings.frames_per_second
    n = options.nframes or sample_count(count, duration, settings, fps, options)
    return VideoPlan(n, frame_size(shape, n, settings, options), lambda: Video(np.empty(0), fps, duration))


def check_room(plan: VideoPlan, settings: VideoSettings, what: str, room: int) -> None:
    """Raise InputError if a video takes more than `room` tokens."""
    tokens = plan.tokens(settings)
    if tokens > room:
        raise InputError(
            f"{what}: {plan.count} frames of {plan.size[1]} x {plan.size[0]} pixels take {tokens} tokens, and {room} "
            "are left of the context; sample it at a lower fps, or state nframes, max_pixels or a span"
        )


def _decoded(
    source: Source, timeline: Timeline, choice: Choice, settings: VideoSettings, options: Options, bounds: Bounds
) -> np.ndarray:
    """The frames on display at the chosen moments, upright and resized: uint8 [T, H, W, 3]."""
    count = len(choice.times)
    for decode in (decode_at, decode_all) if timeline.is_exact else (decode_all,):
        with open_container(source, "video") as container:
            upright = (
                (number, _upright(frame, bounds)) for number, frame in decode(container, timeline, choice, bounds)
            )
            frames = _resized(upright, count, lambda shape: frame_size(shape, count, settings, options))
        if frames is not None:
            return frames
    raise InputError(f"{bounds.what}: none of its frames could be decoded")


def _resized(
    numbered: Iterator[tuple[int, np.ndarray]], count: int, size_of: Callable[[Sequence[int]], tuple[int, int]]
) -> np.ndarray | None:
    """The numbered frames, resized as the first is: uint8 [count, H, W, 3]; None if some are missing.

    Resizing takes longer than decoding, so it runs in threads; only few frames are queued, because they are large.
    """
    frames, taken = np.empty(0, np.uint8), set[int]()
    workers, running = min(os.cpu_count() or 1, RESIZERS), deque[Future]()
    with ThreadPoolExecutor(workers) as pool:
        for number, pixels in numbered:
            if not taken:
                frames = np.empty((count, *size_of(pixels.shape), CHANNELS), np.uint8)
            taken.add(number)
            running.append(pool.submit(_put, frames, number, pixels))
            if len(running) > workers:
                running.popleft().result()
        for left in running:
            left.result()
    return frames if len(taken) == count else None


def _put(frames: np.ndarray, number: int, pixels: np.ndarray) -> None:
    frames[number] = image.resize(pixels, frames.shape[1], frames.shape[2])


def _upright(frame: "VideoFrame", bounds: Bounds) -> np.ndarray:
    """A decoded frame as upright RGB, uint8 [H, W, 3]."""
    if frame.width * frame.height > bounds.limits.frame_pixels:
        raise InputError(f"{bounds.what}: frames of {frame.width} x {frame.height} pixels; scale it down")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))


def _plan_frames(
    frames: Frames, settings: VideoSettings, fps: float | None, limits: VideoLimits, options: Options
) -> VideoPlan:
    """A plan for frames that are sampled already."""
    stated = [name for name in SAMPLING if getattr(options, name) is not None]
    if stated:
        raise InputError(f"video: {stated[0]!r} is of files; frames that are given one by one are sampled already")
    if isinstance(frames, np.ndarray):
        if fps is None:
            raise InputError("video array without fps; give the rate at which its frames were sampled")
        shape, size_of = _check_array(frames, settings, limits).shape[1:], frame_size
    else:
        _check_count(len(frames), settings)
        size_of, fps = listed_frame_size, LIST_FPS if fps is None else fps
        shape = image.image_shape(frames[0])
    count = len(frames)
    even = -(-count // settings.frame.temporal_patch_size) * settings.frame.temporal_patch_size
    size = size_of(shape, even, settings, options)

    def load() -> Video:
        pictures = frames if isinstance(frames, np.ndarray) else (image.load_image(frame) for frame in frames)
        resized: list[np.ndarray] = []
        for picture in pictures:
            height, width = size_of(picture.shape, even, settings, options)
            if resized and (height, width) != resized[0].shape[:2]:
                raise InputError(
                    f"video: frame {len(resized)} of {picture.shape[1]} x {picture.shape[0]} pixels is not of the "
                    "first one's shape; give frames of one size"
                )
            resized.append(image.resize(picture, height, width))
        return Video(np.stack(resized), float(fps), count / fps)

    return VideoPlan(count, size, load)


def _check_array(frames: np.ndarray, settings: VideoSettings, limits: VideoLimits) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != CHANNELS or not frames.size:
        raise InputError(f"video array of {frames.dtype} {frames.shape}; pass uint8 [T, H, W, 3], values 0 to 255")
    _check_count(len(frames), settings)
    if frames.shape[1] * frames.shape[2] > limits.frame_pixels:
        raise InputError(f"video array of {frames.shape[2]} x {frames.shape[1]} pixels; make it smaller")
    return frames


def _check_count(count: int, settings: VideoSettings) -> None:
    if not count:
        raise InputError("video: a list without frames; give at least one")
    if count > settings.max_frames:
        raise InputError(f"video array of {count} frames; sample it down to {settings.max_frames} at a lower fps")


def patchify_video(video: Video, settings: VideoSettings) -> tuple[np.ndarray, tuple[int, int, int], float]:
    """Cut a video into patches float32 [t * h * w, patch_dim]; also returns their grid (t, h, w) and seconds per step.

    The last frame is repeated until their number is a multiple of the temporal patch.
    """
    T, frames = settings.frame.temporal_patch_size, video.frames
    if len(frames) % T:
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % T, axis=0)])
    patches, grid = image.patchify_frames(frames, settings.frame)
    return patches, grid, T / video.fps


def video_audio(
    source: Source, max_seconds: float = audio.MAX_SECONDS, options: Options = UNSTATED
) -> np.ndarray | None:
    """The sound track of a video, float32 [samples], mono at 16 kHz; None if there is none or it is too short.

    Sample 0 is the moment of the first frame, or of the start of a span in `options`: sound that starts later is
    preceded by silence, earlier sound is cut off.
    """
    what = f"video {name_of(source)}"
    with open_container(source, "video") as container:
        pictures = video_stream(container, Bounds(what))
        if not container.streams.audio:
            return None
        first = float((pictures.start_time or 0) * (pictures.time_base or 0))
        samples, rate, start = audio.read_track(container, what, max_seconds)
    lead = round((start - first) * rate)
    samples = np.pad(samples, (max(lead, 0), 0))[max(-lead, 0) :]
    start, end = options.video_start or 0.0, options.video_end
    samples = samples[round(start * rate) :][: None if end is None else round((end - start) * rate)]
    if samples.size:
        audio.check_samples(what, samples)
        samples = audio.resample(samples, rate)
    return samples if samples.size >= audio.MIN_SAMPLES else None
