"""Speech as bytes that clients play: whole, or in pieces while it is made.

Formats are wav and flac (16-bit), pcm16 (the samples alone, little-endian), mp3, and opus in Ogg; all mono at 24 kHz.
The pieces of a format join to one file of it, except those of wav, each of which is a whole file, because that is what
clients of chat streams decode. FFmpeg, through PyAV, encodes what is compressed.
"""

import io
from typing import Any, Protocol

import numpy as np

from omni_jax.models.code2wav import SAMPLES_PER_SECOND

# The media type of each format.
FORMATS = {
    "wav": "audio/wav",
    "pcm16": f"audio/pcm;rate={SAMPLES_PER_SECOND};channels=1",  # audio/L16 would be big-endian
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
# FFmpeg's container, codec and format of samples, and options of the container.
_ENCODERS = {
    "flac": ("flac", "flac", "s16", {}),
    "mp3": ("mp3", "libmp3lame", "s16p", {"write_xing": "0"}),
    "opus": ("ogg", "libopus", "s16", {"page_duration": "200000"}),
}
_UNKNOWN_LENGTH = 0xFFFFFFFF  # of a WAV file whose end is not known when its header is sent
_HEADER_BYTES = 36  # of a WAV file, after the field that states its size


class Sound(Protocol):
    """Encodes one sound as it comes."""

    def add(self, wave: np.ndarray) -> bytes:
        """What the next samples, float32 [samples] in [-1, 1], add; may be empty."""
        ...

    def end(self) -> bytes:
        """What is left when no more come."""
        ...


def whole(wave: np.ndarray, form: str) -> bytes:
    """A sound, float32 [samples] in [-1, 1], as one file of a format."""
    if form == "wav":
        return _wav_header(2 * wave.size) + pcm16(wave)
    if form == "pcm16":
        return pcm16(wave)
    file = io.BytesIO()
    encoder = _Encoder(form, file)
    encoder.add(wave)
    encoder.end()
    return file.getvalue()


def pieces(form: str) -> Sound:
    """What encodes a sound in pieces, for events that clients decode one by one or join; see the module."""
    return _Waves() if form == "wav" else joined(form)


def joined(form: str) -> Sound:
    """What encodes a sound in pieces that join to one file, for a response that is read while it is made."""
    if form == "wav":
        return _Raw(_wav_header(_UNKNOWN_LENGTH))
    return _Raw(b"") if form == "pcm16" else _Encoder(form, _Outlet())


def pcm16(wave: np.ndarray) -> bytes:
    """Samples float32 [samples] as 16-bit integers, as libsndfile rounds them in `write_sound`."""
    return np.clip(np.floor(wave * 32768.0), -32768, 32767).astype("<i2").tobytes()


def _wav_header(data_bytes: int) -> bytes:
    """The header of a WAV file of 16-bit mono samples."""
    rate, size = SAMPLES_PER_SECOND, min(data_bytes + _HEADER_BYTES, _UNKNOWN_LENGTH)
    numbers = [(16, 4), (1, 2), (1, 2), (rate, 4), (2 * rate, 4), (2, 2), (16, 2)]
    form = b"".join(number.to_bytes(length, "little") for number, length in numbers)
    return b"RIFF" + size.to_bytes(4, "little") + b"WAVEfmt " + form + b"data" + data_bytes.to_bytes(4, "little")


class _Waves:
    """Each piece a WAV file."""

    def add(self, wave: np.ndarray) -> bytes:
        return whole(wave, "wav") if wave.size else b""

    def end(self) -> bytes:
        return b""


class _Raw:
    """A header and the samples."""

    def __init__(self, header: bytes):
        self._header = header

    def add(self, wave: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + pcm16(wave)

    def end(self) -> bytes:
        header, self._header = self._header, b""
        return header


class _Outlet:
    """A file that can only be written, so that FFmpeg never goes back to what was sent; `take` empties it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken


class _Encoder:
    """Encodes a sound into a file; what an `_Outlet` has got is handed out."""

    def __init__(self, form: str, file: Any):
        import av

        container, codec, samples, options = _ENCODERS[form]
        self._file = file
        self._container = av.open(file, "w", format=container, options=options)
        self._stream: Any = self._container.add_stream(codec, rate=SAMPLES_PER_SECOND, layout="mono")
        self._resampler = av.AudioResampler(samples, "mono", SAMPLES_PER_SECOND)
        self._at = 0

    def add(self, wave: np.ndarray) -> bytes:
        import av

        if wave.size:
            samples = np.frombuffer(pcm16(wave), np.int16)[None]
            frame: Any = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate, frame.pts = SAMPLES_PER_SECOND, self._at
            self._at += wave.size
            self._encode(frame)
        return self._taken()

    def end(self) -> bytes:
        self._encode(None)
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._taken()

    def _encode(self, frame: Any) -> None:
        for part in self._resampler.resample(frame):
            self._container.mux(self._stream.encode(part))

    def _taken(self) -> bytes:
        return self._file.take() if isinstance(self._file, _Outlet) else b""
