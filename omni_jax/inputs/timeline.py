"""Which frames of a video are taken, and how to decode these without the others.

Data flow: `read_timeline` lists a file's packets without decoding them, `choose` picks moments and their rate, and
`decode_at` returns the frames on display at these moments. A frame needs the packets from the preceding key frame on;
all other packets are read and dropped, and so are, in codecs that mark them, frames that no other frame refers to.

Where this is not reliable (packets without time stamps, a frame that is missing because it depends on frames before its
key frame), everything is decoded from the start; the frames are the same either way.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.options import UNSTATED, Options
from omni_jax.inputs.settings import VideoSettings
from omni_jax.inputs.source import MAX_WALL_SECONDS, STATE_DURATION, demux

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_SECONDS = 4 * 3600.0
MAX_FRAME_PIXELS = 8192 * 4320
MIN_RATE, MAX_RATE = 1 / 120, 1000.0  # frames per second, on average; a file outside is damaged or malicious
STAMP_SLACK = 1e-3  # seconds; Matroska rounds its time stamps to milliseconds
# Codecs whose decoder knows exactly which frames no other frame refers to.
_MARK_DISPOSABLE = ("h264", "mpeg1video", "mpeg2video", "mpeg4")


@dataclass(frozen=True)
class VideoLimits:
    """The largest playing time and time to decode, in seconds, and number of pixels of a decoded frame."""

    seconds: float = MAX_SECONDS
    wall_seconds: float = MAX_WALL_SECONDS
    frame_pixels: int = MAX_FRAME_PIXELS


@dataclass(frozen=True, eq=False)
class Timeline:
    """The packets of a video in the order of decoding, all arrays [packets], and the total duration in seconds.

    stamps: int64, when a packet's frame is shown, in units of the stream's time base. seconds: float64, the same in
    seconds from the first frame. is_key: bool, decoding can begin here. is_shown: bool. shape: (height, width) in
    pixels, before rotation. is_exact: every packet states its own time, and no two the same.
    """

    stamps: np.ndarray
    seconds: np.ndarray
    is_key: np.ndarray
    is_shown: np.ndarray
    duration: float
    shape: tuple[int, int]
    is_exact: bool


@dataclass(frozen=True, eq=False)
class Choice:
    """The moments at which frames are taken, float64 [T] in seconds from the first frame, and their rate per second.

    duration: that of the span from which they are taken, in seconds.
    """

    times: np.ndarray
    fps: float
    duration: float


LIMITS = VideoLimits()


class Bounds:
    """The bounds of work on one file: limits, and a deadline that counts from now. `what` names the file in errors."""

    def __init__(self, what: str, limits: VideoLimits = LIMITS):
        self.what, self.limits = what, limits
        self._end = time.monotonic() + limits.wall_seconds

    def check_time(self) -> None:
        """Raise InputError after the deadline."""
        if time.monotonic() > self._end:
            most = self.limits.wall_seconds
            raise InputError(f"{self.what}: decoding takes too long, over {most:.0f} s; cut it, or scale it down")


def video_stream(container: "InputContainer", bounds: Bounds) -> "VideoStream":
    """The first stream of moving pictures; InputError where there is none or its frames are too large."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise InputError(f"{bounds.what}: it holds no moving pictures; sound goes in as audio, a picture as an image")
    pixels = streams[0].codec_context.width * streams[0].codec_context.height
    if pixels > bounds.limits.frame_pixels:
        raise InputError(
            f"{bounds.what}: frames of {pixels} pixels, more than {bounds.limits.frame_pixels}; scale it down"
        )
    streams[0].thread_type = "AUTO"
    return streams[0]


def read_timeline(container: "InputContainer", bounds: Bounds) -> Timeline:
    """List the packets of a video without decoding; InputError for a damaged or too long one."""
    stream = video_stream(container, bounds)
    stamps, keys, shown, lengths, exact = [], [], [], [], True
    for packet in demux(container, stream, bounds.what):
        if packet.size:
            stamp = packet.dts if packet.pts is None else packet.pts
            exact &= packet.pts is not None
            stamps.append(-1 if stamp is None else stamp)
            keys.append(packet.is_keyframe)
            shown.append(stamp is not None and not packet.is_discard)
            lengths.append(packet.duration or 0)
            bounds.check_time()
    stamps, shown = np.array(stamps, np.int64), np.array(shown, bool)
    if not shown.any():
        raise InputError(f"{bounds.what}: it holds no frames, or none with a time stamp; put the stream in an MP4 file")
    count, unit = int(shown.sum()), float(stream.time_base or 0)
    first, last = stamps[shown].min(), stamps[shown].max()
    length = max(n for n, stamp, is_shown in zip(lengths, stamps, shown, strict=True) if is_shown and stamp == last)
    duration = float(last - first + (length or (last - first) / max(count - 1, 1))) * unit
    if not duration or not MIN_RATE <= count / duration <= MAX_RATE:
        raise InputError(f"{bounds.what}: {count} frames in {duration:g} s; its time stamps are damaged: re-encode it")
    if duration > bounds.limits.seconds:
        raise InputError(
            f"{bounds.what}: {duration:.0f} s is longer than {bounds.limits.seconds:.0f} s; cut it into parts"
        )
    codec = stream.codec_context
    exact &= len(np.unique(stamps[shown])) == count
    seconds = (stamps - first) * unit
    return Timeline(stamps, seconds, np.array(keys, bool), shown, duration, (codec.height, codec.width), exact)


def stated_length(container: "InputContainer", bounds: Bounds) -> tuple[int, float, tuple[int, int]] | None:
    """The number of frames, the seconds and the (height, width) that a header states; None where it lacks one."""
    stream = video_stream(container, bounds)
    seconds = float((stream.duration or 0) * (stream.time_base or 0))
    if not container.format.name.startswith(STATE_DURATION):
        return None
    seconds = seconds or (container.duration or 0) / 1e6
    count = stream.frames or round(seconds * float(stream.average_rate or 0))
    if not seconds or not MIN_RATE <= count / seconds <= MAX_RATE:
        return None
    return count, seconds, (stream.codec_context.height, stream.codec_context.width)


def choose(timeline: Timeline, settings: VideoSettings, options: Options, what: str) -> Choice:
    """The moments at which frames are taken, from the options of one video; InputError for options that do not fit it.

    With `fps` they are evenly spaced from the start of the span, as in the reference processor. With `nframes` they are
    spread from its first to its last frame, as in the official utilities.
    """
    seconds = np.sort(timeline.seconds[timeline.is_shown])
    first, last = _span(seconds, options, what)
    end = seconds[last + 1] if last + 1 < len(seconds) else timeline.duration
    start, count = float(seconds[first]), last + 1 - first
    duration = float(end) - start
    if options.nframes is None:
        n = sample_count(count, duration, settings, options.fps or settings.frames_per_second, options)
        times = start + duration * np.arange(n) / n
    else:
        n = _stated_count(options.nframes, count, settings, what)
        spread = np.interp(np.linspace(seconds[first], seconds[last], n), seconds, np.arange(len(seconds)))
        times = seconds[np.round(np.round(spread, 6)).astype(int)]  # twice, because halves go to even numbers
    return Choice(times, n / duration, duration)


def _span(seconds: np.ndarray, options: Options, what: str) -> tuple[int, int]:
    """The numbers of the first and the last frame within a span; seconds float64 [frames]: when each is shown."""
    start, end = options.video_start or 0.0, options.video_end
    first = int(np.searchsorted(seconds, start - STAMP_SLACK))
    last = len(seconds) if end is None else int(np.searchsorted(seconds, end + STAMP_SLACK, side="right"))
    if first >= last:
        until = "its end" if end is None else f"{end:g} s"
        raise InputError(
            f"{what}: no frame from {start:g} s to {until}; its frames are shown from 0 to {seconds[-1]:g} s"
        )
    return first, last - 1


def sample_count(count: int, duration: float, settings: VideoSettings, fps: float, options: Options = UNSTATED) -> int:
    """How many of `count` frames to take for `fps` per second: a multiple of the temporal patch, but at least one."""
    T = settings.frame.temporal_patch_size
    most = min(options.max_frames or settings.max_frames, count)
    least = -(-(options.min_frames or settings.min_frames) // T) * T
    wanted = max(round(duration * fps, 2), least)  # 7.998 frames are 8 whose stamps were rounded
    return max(int(min(wanted, most)) // T * T, min(T, most))


def _stated_count(nframes: int, count: int, settings: VideoSettings, what: str) -> int:
    T = settings.frame.temporal_patch_size
    n = round(nframes / T) * T
    if not T <= n <= count:
        raise InputError(
            f"{what}: 'nframes' is {nframes}, taken as {n}; it has {count}: give a number from {T} to that"
        )
    return n


def decode_at(
    container: "InputContainer", timeline: Timeline, choice: Choice, bounds: Bounds
) -> Iterator[tuple[int, "VideoFrame"]]:
    """The frames on display at the chosen moments, each with the number of its moment, in any order.

    Ends early if decoding only parts of the file proves unreliable.
    """
    from av.video.frame import PictureType

    wanted = _on_display(timeline, choice.times)
    numbers = defaultdict[int | None, list[int]](list)
    for number, stamp in enumerate(timeline.stamps[wanted].tolist()):
        numbers[stamp].append(number)
    begun = None
    for frame, key in _decoded(container, timeline, wanted, bounds):
        # In videos that are refreshed part by part, "key frames" are not complete.
        if key != begun and (frame.pts != key or frame.pict_type != PictureType.I) or frame.is_corrupt:
            return
        begun = key
        yield from ((number, frame) for number in numbers.get(frame.pts, ()))


def _on_display(timeline: Timeline, times: np.ndarray) -> np.ndarray:
    """The packets whose frames are on display at `times` float64 [T]: int [T]."""
    shown = np.flatnonzero(timeline.is_shown)
    shown = shown[np.argsort(timeline.seconds[shown], kind="stable")]
    return shown[np.maximum(np.searchsorted(timeline.seconds[shown], times + STAMP_SLACK, side="right") - 1, 0)]


def needed_packets(timeline: Timeline, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which packets the frames of `wanted`, int [T], need, and where decoding starts again: both bool [packets].

    A frame needs all packets from the last key frame that is decoded and shown no later than itself. A frame that is
    decoded after a key frame and shown before it depends on earlier packets; if these are left out, so is that frame.
    """
    needed, begins = np.zeros((2, len(timeline.stamps)), bool)
    keys = np.flatnonzero(timeline.is_key)
    for packet in np.unique(wanted):
        before = keys[(keys <= packet) & (timeline.stamps[keys] <= timeline.stamps[packet])]
        needed[before[-1] if len(before) else 0 : packet + 1] = True
    begins[1:] = needed[1:] & ~needed[:-1]
    for start in np.flatnonzero(begins):
        needed[start:] &= timeline.stamps[start:] >= timeline.stamps[start]
    return needed, begins


def _decoded(
    container: "InputContainer", timeline: Timeline, wanted: np.ndarray, bounds: Bounds
) -> Iterator[tuple["VideoFrame", int | None]]:
    """The frames of the needed packets, each with the stamp of the key frame at which decoding last started again."""
    from av.error import FFmpegError

    stream = video_stream(container, bounds)
    codec, (needed, begins) = stream.codec_context, needed_packets(timeline, wanted)
    disposable = codec.name in _MARK_DISPOSABLE
    taken, last, key = set(wanted.tolist()), int(np.flatnonzero(needed)[-1]), None
    try:
        for number, packet in enumerate(p for p in container.demux(stream) if p.size):
            bounds.check_time()
            if begins[number]:
                yield from ((frame, key) for frame in codec.decode(None))
                codec.flush_buffers()
                key = int(timeline.stamps[number])
            if needed[number]:
                codec.skip_frame = "NONREF" if disposable and number not in taken else "DEFAULT"
                yield from ((frame, key) for frame in codec.decode(packet))
            if number == last:
                break
        yield from ((frame, key) for frame in codec.decode(None))
    except FFmpegError:
        return


def decode_all(
    container: "InputContainer", timeline: Timeline, choice: Choice, bounds: Bounds
) -> Iterator[tuple[int, "VideoFrame"]]:
    """As `decode_at`, but decodes everything from the start; InputError for a damaged frame."""
    shown, start, number = None, None, 0
    for frame in container.decode(video_stream(container, bounds)):
        bounds.check_time()
        if frame.is_corrupt or frame.time is None:
            raise InputError(f"{bounds.what}: a damaged frame; re-encode it")
        start = frame.time if start is None else start
        while shown and number < len(choice.times) and choice.times[number] < frame.time - start - STAMP_SLACK:
            yield number, shown
            number += 1
        shown = frame
        if number == len(choice.times):
            return
    if shown is None:
        raise InputError(f"{bounds.what}: none of its frames could be decoded")
    yield from ((left, shown) for left in range(number, len(choice.times)))
