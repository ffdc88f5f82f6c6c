"""Sound tracks of containers: none of their samples is lost to other streams, tags, padding or older encodings."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.audio import load_audio
from tests.helpers.sounds import RATE, encode, noise


@pytest.mark.parametrize(
    "tail",
    [
        b"TAG" + bytes(125),
        b"LYRICSBEGIN" + b"la la la\n" * 200 + b"LYRICS200" + b"TAG" + bytes(125),
        bytes(5000),
        b"\xff" * 5000,
    ],
    ids=["title", "lyrics", "zeros", "ones"],
)
def test_tags_and_padding_after_an_mp3_are_no_damage(data_dir, tail):
    mp3 = (data_dir / "cover.mp3").read_bytes()
    assert 0 <= load_audio(mp3 + tail).size - load_audio(mp3).size < 1152


def test_mp3s_that_were_joined_are_read_to_the_end(data_dir):
    mp3 = (data_dir / "cover.mp3").read_bytes()
    assert load_audio(mp3 + mp3).size > 2 * load_audio(mp3).size
    spoilt = bytearray(mp3)
    spoilt[-2000:-1000] = bytes(1000)
    with pytest.raises(InputError, match="damaged"):
        load_audio(bytes(spoilt))


def test_an_mp3_inside_a_wav_is_read():
    mp3 = encode(noise(0.5), kind="MP3")
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 0, b"WAVE", b"fmt ", 16, 0x55, 1, RATE, 4000, 1, 0)
    wav = header + struct.pack("<4sI", b"data", len(mp3)) + mp3
    assert load_audio(wav).size == pytest.approx(8000, abs=2000)  # with the encoder's delay
    assert load_audio(header + struct.pack("<4sI", b"data", 0xFFFFFFFF) + mp3).size == load_audio(wav).size


@pytest.mark.parametrize("name, samples", [("cover.mp3", 16_000), ("cover.m4a", 16_384), ("audio_first.mp4", 16_384)])
def test_sound_before_other_streams_is_read_to_its_end(data_dir, name, samples):
    assert load_audio(data_dir / name).size == samples


CONTAINERS = {  # what they are written with: format, sound, pictures
    "m4a": ("ipod", "aac", None),
    "mp4": ("mp4", "aac", "mpeg4"),
    "mov": ("mov", "pcm_s16le", "mpeg4"),
    "mkv": ("matroska", "ac3", "mpeg4"),
    "webm": ("matroska", "libopus", "mpeg4"),
    "ts": ("mpegts", "mp2", "mpeg2video"),
    "flv": ("flv", "aac", "flv"),
    "wma": ("asf", "wmav2", "wmv2"),
    "avi": ("avi", "libmp3lame", "mpeg4"),
}


def contained(kind: str, others: list[str]) -> bytes:
    """Half a second of sound in a container, followed by other streams, with a title and, where it can, chapters."""
    data, (container, codec, _) = io.BytesIO(), CONTAINERS[kind]
    with av.open(data, "w", format=container) as out:
        out.metadata["title"] = "sound"
        tracks = [out.add_stream(name, rate=48_000 if name == codec else 25) for name in (codec, *others)]
        for track in tracks:
            if track.type == "audio":
                track.bit_rate, track.layout = 64_000, "mono"
            else:
                track.width, track.height, track.pix_fmt = 32, 32, "yuv420p"
        if kind in ("m4a", "mkv"):
            part = {"id": 0, "start": 0, "end": 250, "time_base": Fraction(1, 1000), "metadata": {"title": "one"}}
            out.set_chapters([part])
        for i, track in enumerate(tracks):
            frames = [av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * n, np.uint8)) for n in range(12)]
            if track.type == "audio":
                wave = np.sin(np.arange(24_000) / (9 + i)).astype(np.float32)[None] / 3
                frames = [av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")]
                frames[0].sample_rate = 48_000
            for n, frame in enumerate(frames):
                frame.pts, frame.time_base = n, Fraction(1, 48_000 if track.type == "audio" else 25)
                out.mux(track.encode(frame))
            out.mux(track.encode(None))
    return data.getvalue()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_comes_after_the_sound_takes_nothing_from_it(kind):
    alone, (_, sound, pictures) = load_audio(contained(kind, [])), CONTAINERS[kind]
    assert alone.size > 7500  # WMA keeps what it has not filled
    for others in ([sound], [pictures], [pictures, sound]):
        if None not in others and not (kind == "flv" and sound in others):  # which holds one sound only
            np.testing.assert_allclose(load_audio(contained(kind, others)), alone, atol=1e-4)


def test_a_title_in_an_older_encoding_is_no_obstacle(data_dir):
    tag = b"TIT2" + (6).to_bytes(4, "big") + b"\0\0" + b"\3caf\xe9s"  # says UTF-8, is Latin-1
    assert load_audio(b"ID3\3\0\0" + bytes([0, 0, 0, len(tag)]) + tag + (data_dir / "cover.mp3").read_bytes()).size
