"""Files of flat grey videos."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 96, 64


def encode(
    path: Path,
    levels: list[int],
    times: list[int] | None = None,
    codec: str = "mpeg4",
    sound: tuple[np.ndarray, float] | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video of flat grey frames shown from `times` (milliseconds; default every 40), with samples [n] at 16 kHz and
    the second at which they start."""
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        track = out.add_stream("pcm_s16le", rate=16_000, layout="mono") if sound else None
        for level, at in zip(levels, times or range(0, 40 * len(levels), 40), strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound and track:
            pcm = np.round(sound[0] * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, round(sound[1] * 16_000), Fraction(1, 16_000)
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return path.read_bytes()
