"""Sounds: files that are none, cut, damaged or lie, arrays that are none, and places where none can be written."""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omni_jax.errors import InputError
from omni_jax.inputs.audio import load_audio
from omni_jax.sound import check_sound_file, write_sound
from tests.bad_inputs.case import Case

RATE = 16_000
DATA = Path(__file__).resolve().parent.parent / "data"


def _noise(seconds: float = 0.5) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def _encoded(kind: str = "WAV", seconds: float = 0.5) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, _noise(seconds), RATE, format=kind)
    return data.getvalue()


def _wav(
    samples: int = 8000, form: int = 1, bits: int = 16, channels: int = 1, rate: int = RATE, stated: int | None = None
) -> bytes:
    """A WAV whose header says what it is told to."""
    size = 2 * samples if stated is None else stated
    header = struct.pack("<IHHIIHH", 16, form, channels, rate, 2 * rate, 2, bits)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + header + b"data" + struct.pack("<I", size) + (
        b"\1\2" * samples
    )  # fmt: skip


def _mp4(*changes: tuple[bytes, bytes]) -> bytes:
    """A sound in an MP4, some words of which are others."""
    data = (DATA / "audio_first.mp4").read_bytes()
    for old, new in changes:
        data = data.replace(old, new)
    return data


def _file(name: str, data: bytes, *words: str) -> Case:
    def act(folder: Path, _: Any) -> None:
        (folder / "a.bin").write_bytes(data)
        load_audio(folder / "a.bin")

    return Case(f"sound: {name}", act, ("a.bin", *words), InputError)


def _array(name: str, array: Any, rate: Any, *words: str) -> Case:
    return Case(f"sound: {name}", lambda *_: load_audio(array, rate), ("audio", *words), InputError)


def _place(name: str, path: Callable[[Path], Any], *words: str) -> Case:
    return Case(f"sound file: {name}", lambda folder, _: check_sound_file(path(folder)), words, InputError)


def _pipe(folder: Path, _: Any) -> None:
    os.mkfifo(folder / "a.wav")
    load_audio(folder / "a.wav")


def _strided(*shape: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(_noise(), shape, (0,) * len(shape))


CASES = [
    _file("empty", b"", "it is empty"),
    _file("text", b"this is not sound at all" * 20, "not a media file"),
    _file("a playlist", b"#EXTM3U\nhttp://a.org/b.mp3\n", "playlist", "pass the media file itself"),
    _file("a web page", b"<!DOCTYPE html><html></html>", "web page"),
    _file("a picture", (DATA / "flower.jpg").read_bytes(), "not a media file"),
    _file("a video without sound", (DATA / "hello_silent.mp4").read_bytes(), "holds no sound"),
    _file("WAV of 0 bits", _wav(bits=0), "codec that FFmpeg does not know", "FLAC"),
    _file("WAV of 255 bits", _wav(bits=255), "codec that FFmpeg does not know"),
    _file("WAV of format 0xFFFF", _wav(form=0xFFFF), "codec that FFmpeg does not know", "FLAC"),
    _file("WAV of format 0", _wav(form=0), "audio"),
    _file("WAV without channels", _wav(channels=0), "audio"),
    _file("WAV of 65,535 channels", _wav(channels=65_535), "channels"),
    _file("WAV of 1 Hz", _wav(rate=1), "a rate of 1 "),
    _file("WAV of 4 GHz", _wav(rate=2**31 - 1), "a rate of 2147483647"),
    _file("WAV cut short", _wav(stated=20_000), "cut short, 16000 of 20000 bytes"),
    _file("WAV cut short by the most", _wav(stated=1_500_000_000), "cut short, 16000 of 1500000000 bytes"),
    _file("WAV with a header only", _wav(0), "no samples"),
    _file("WAV of 200 samples", _wav(200), "at least 201"),
    _file("WAV cut in its header", _wav()[:30], "audio"),
    _file("WAV with a thousand chunks", _wav()[:12] + b"note\0\0\0\0" * 1001 + _wav()[12:], "chunks", "FLAC"),
    _file("two WAVs", _wav() + _wav(), "several recordings", "one by one"),
    _file("two Ogg streams", _encoded("OGG") * 2, "several recordings"),
    _file("FLAC of 10^10 samples", _encoded("FLAC").replace(b"\0\0\x1f\x40", b"\xff" * 4, 1), "audio"),
    _file("FLAC cut short", _encoded("FLAC")[:-2000], "cut short or damaged"),
    _file("AIFF cut short", _encoded("AIFF")[:-2000], "cut short"),
    _file("AU cut short", _encoded("AU")[:-2000], "cut short"),
    _file("Ogg cut in its header", _encoded("OGG")[:100], "audio"),
    _file("MP4 of a codec nobody knows", _mp4((b"mp4a", b"zzzz"), (b"\x17\x40\x15", b"\x17\xfe\x15")),
          "codec that FFmpeg does not know", "FLAC"),
    _file("MP4 cut short", _mp4()[:-3000], "audio"),
    _file("MP4 without its index", _mp4((b"moov", b"junk")), "not a media file"),
    _file("MP3 with a hole", (DATA / "cover.mp3").read_bytes()[:3000] + bytes(500) +
          (DATA / "cover.mp3").read_bytes()[3500:], "damaged"),
    Case("sound: /dev/zero", lambda *_: load_audio("/dev/zero"), ("not a regular file",)),
    Case("sound: a pipe", _pipe, ("not a regular file",)),
    Case("sound: memory of a process", lambda *_: load_audio("/proc/self/mem"), ("cannot be read",)),
    Case("sound: an address", lambda *_: load_audio("https://a.org/b.wav"), ("is a URL", "local path")),
    Case("sound: FFmpeg's own address", lambda *_: load_audio("concat:a.wav|b.wav"), ("is a URL",)),
    Case("sound: an empty path", lambda *_: load_audio(""), ("empty path",)),
    Case("sound: a null character", lambda *_: load_audio("a\0b"), ("null character",)),
    Case("sound: half a character", lambda *_: load_audio("a\ud800"), ("half a character",)),
    Case("sound: nobody's home", lambda *_: load_audio("~nobody-of-this-name/a.wav"), ("home directory",)),
    Case("sound: a list", lambda *_: load_audio([0.0]), ("of type list", "NumPy array")),  # type: ignore[arg-type]
    Case("sound: every second byte", lambda *_: load_audio(memoryview(_wav())[::2]), ("cannot be read",)),
    _array("no rate", _noise(), None, "sampling_rate"),
    _array("a rate in words", _noise(), "16000", "sampling_rate"),
    _array("a rate of True", _noise(), True, "sampling_rate"),
    _array("a rate of 10^400", _noise(), 10**400, "rate"),
    _array("a rate that is no number", _noise(), np.float32("nan"), "rate of nan"),
    _array("a complex rate", _noise(), np.complex64(RATE), "sampling_rate"),
    _array("10^11 samples that are one", _strided(10**11), RATE, "longer than 3600 s"),
    _array("32 channels of 10^10", _strided(32, 10**10), RATE, "longer than 3600 s"),
    _array("10^18 in three axes", _strided(10**6, 10**6, 10**6), RATE, "shape"),
    _array("objects", np.array([0.5] * 900, object), RATE, "dtype object"),
    _array("pairs", np.zeros(900, [("left", "f4"), ("right", "f4")]), RATE, "dtype"),
    _array("complex samples", _noise().astype(complex), RATE, "dtype complex128"),
    _array("words", np.array(["a"] * 900), RATE, "dtype"),
    _array("one number", np.array(0.5), RATE, "shape ()"),
    _array("beyond float32", np.full(900, 1e300), RATE, "infinite"),
    _array("integers as floats", _noise() * 32768, RATE, "full scale 1"),
    _array("infinities that cancel", np.array([[np.inf] * 900, [-np.inf] * 900]), RATE, "NaN or infinite"),
    _place("a name of 256 letters", lambda folder: folder / ("a" * 252 + ".wav"), "file name too long"),
    _place("a missing folder", lambda folder: folder / "no" / "a.wav", "folder does not exist"),
    _place("below a device", lambda _: "/dev/null/a.wav", "folder does not exist"),
    _place("where no file can be", lambda _: "/proc/a.wav", "no such file can be made"),
    _place("another ending", lambda folder: folder / "a.mp3", ".wav or .flac"),
    _place("a directory", lambda folder: (folder / "a.wav").mkdir() or folder / "a.wav", "is a directory"),
    _place("None", lambda _: None, "NoneType"),
    _place("half a character", lambda folder: f"{folder}/\ud800.wav", "half a character"),
    Case("sound file: no samples", lambda folder, _: write_sound(folder / "a.wav", None), ("speech=True",)),  # type: ignore
    Case("sound file: NaN", lambda folder, _: write_sound(folder / "a.wav", _noise() * np.nan), ("NaN",)),
    Case("sound file: no rate", lambda folder, _: write_sound(folder / "a.wav", _noise(), 0), ("whole number",)),
]  # fmt: skip
