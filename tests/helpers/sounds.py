"""Sounds, and files of them."""

import io
from typing import Any

import av
import numpy as np
import soundfile

RATE = 16_000


def encode(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """samples [n] or [n, channels] as a file."""
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=kind, subtype=subtype)
    return data.getvalue()


def in_container(kind: str, codec: str, samples: np.ndarray) -> bytes:
    """int16 [n, channels] at 16 kHz as a media file."""
    data = io.BytesIO()
    with av.open(data, "w", format=kind) as out:
        layout = "mono" if samples.shape[1] == 1 else f"{samples.shape[1]} channels"
        track: Any = out.add_stream(codec, rate=RATE, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=track.layout)
        frame.sample_rate, frame.pts = RATE, 0
        for part in av.AudioResampler(track.format, frame_size=track.frame_size or None).resample(frame):
            out.mux(track.encode(part))
        out.mux(track.encode(None))
    return data.getvalue()


def noise(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)
