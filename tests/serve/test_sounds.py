"""Speech as bytes: each format decodes to the sound, whole and in pieces, and pieces join to one file."""

import io
import wave as wavefile
from itertools import pairwise

import numpy as np
import pytest

from omni_jax.inputs.audio import read_file
from omni_jax.serve.sounds import FORMATS, joined, pcm16, pieces, whole
from omni_jax.sound import write_sound

RATE = 24_000
SOUND = (0.4 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)
CUTS = [0, 1, 960, 3000, 3000, 30_001, SOUND.size]
EXACT = ("wav", "pcm16", "flac")


def _decoded(data: bytes, form: str) -> tuple[np.ndarray, int]:
    if form == "pcm16":
        return np.frombuffer(data, "<i2") / np.float32(32768), RATE
    return read_file(data)


def _tone(samples: np.ndarray, rate: int) -> float:
    """The frequency in Hz that is the loudest."""
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / samples.size)


def _in_pieces(encoder) -> list[bytes]:
    return [*(encoder.add(SOUND[a:b]) for a, b in pairwise(CUTS)), encoder.end()]


@pytest.mark.parametrize("form", FORMATS)
def test_whole_sounds_decode_to_what_was_said(form):
    samples, rate = _decoded(whole(SOUND, form), form)
    assert abs(samples.size / rate - 2) < 0.08
    assert abs(_tone(samples, rate) - 440) < 1
    if form in EXACT:
        np.testing.assert_array_equal(np.rint(samples * 32768), np.floor(SOUND * 32768))


@pytest.mark.parametrize("form", FORMATS)
def test_joined_pieces_are_one_file(form):
    parts = _in_pieces(joined(form))
    assert sum(map(bool, parts)) > 2  # not all at the end
    if form == "wav":
        data = b"".join(parts)
        assert data[44:] == pcm16(SOUND) and data[40:44] == b"\xff" * 4
        return
    samples, rate = _decoded(b"".join(parts), form)
    assert abs(samples.size / rate - 2) < 0.08 and abs(_tone(samples, rate) - 440) < 1
    if form in EXACT:
        np.testing.assert_array_equal(np.rint(samples * 32768), np.floor(SOUND * 32768))


def test_samples_alone_are_little_endian_and_sent_as_such():
    assert pcm16(np.array([2 / 32768], np.float32)) == b"\2\0"
    assert FORMATS["pcm16"] == "audio/pcm;rate=24000;channels=1"  # audio/L16 is big-endian


def test_each_piece_of_wav_is_a_file():
    parts = [part for part in _in_pieces(pieces("wav")) if part]
    assert len(parts) == 5  # nothing is sent for no samples
    read = []
    for part in parts:
        with wavefile.open(io.BytesIO(part)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
            read.append(file.readframes(file.getnframes()))
    assert b"".join(read) == pcm16(SOUND)


@pytest.mark.parametrize("form", FORMATS)
def test_silence_without_samples_is_no_error(form):
    assert isinstance(whole(np.zeros(0, np.float32), form), bytes)
    encoder = joined(form)
    assert isinstance(encoder.add(np.zeros(0, np.float32)) + encoder.end(), bytes)


def test_samples_are_rounded_as_files_are(tmp_path):
    loud = np.array([-2.0, -1.0, -0.50001, 0.0, 0.25, 0.99999, 1.0, 2.0], np.float32)
    write_sound(tmp_path / "a.wav", np.clip(loud, -1, 1))
    with wavefile.open(str(tmp_path / "a.wav")) as file:
        assert file.readframes(99) == pcm16(loud)
