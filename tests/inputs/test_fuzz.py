"""Media with random damage, from a fixed seed: each is read, or refused in one sentence; nothing else is raised."""

import io
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.inputs.audio import load_audio
from omni_jax.inputs.image import load_image
from omni_jax.inputs.video import video_audio
from tests.helpers.sounds import in_container

MUTATIONS = 15
SOUNDS = ("WAV", "AIFF", "AU", "W64", "CAF", "FLAC", "OGG")
PICTURES = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM")
CONTAINERS = ("cover.mp3", "cover.m4a", "audio_first.mp4")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A copy in which a few bits are flipped, or stretches are cut out, inserted, repeated, or made noughts or ones."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        count = rng.choice((1, 2, 4, 16, 64, 400))
        at = rng.randrange(max(1, min(len(out), rng.choice((256, 10**9)))))  # headers are hit half of the time
        stretch = out[at : at + count]
        match rng.randrange(6):
            case 0:
                out[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in stretch[:1])
            case 1:
                del out[at : at + count]
            case 2:
                out[at:at] = rng.randbytes(count)
            case 3:
                out[at : at + count] = rng.choice((b"\0", b"\xff")) * len(stretch)
            case 4:
                start = rng.randrange(max(1, len(out)))
                out[at : at + count] = out[start : start + count]
            case 5:
                del out[max(at, 64) :]
    return bytes(out)


def sound(kind: str) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(0).normal(0, 0.1, 4000), 16_000, format=kind)
    return data.getvalue()


def picture(kind: str) -> bytes:
    data = io.BytesIO()
    Image.radial_gradient("L").resize((48, 32)).convert("RGB").save(data, kind)
    return data.getvalue()


def check(data: bytes, seed: str, read: Callable[[bytes], object]) -> None:
    read(data)
    messages = []
    for i in range(MUTATIONS):
        try:
            read(mutated(data, random.Random(f"{seed} {i}")))
        except InputError as error:
            messages.append(str(error))
    assert messages
    assert not [message for message in messages if re.search(r"\n|at 0x|\[Errno", message)]


@pytest.mark.parametrize("kind", SOUNDS)
def test_damaged_sounds(kind):
    check(sound(kind), kind, load_audio)


@pytest.mark.parametrize("kind", PICTURES)
def test_damaged_pictures(kind):
    check(picture(kind), kind, load_image)


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_containers(name, data_dir: Path):
    check((data_dir / name).read_bytes(), name, load_audio)


@pytest.mark.parametrize("codec, channels", [("pcm_s16le", 16), ("pcm_f32le", 9)])
def test_damaged_sounds_of_many_channels(codec, channels):
    samples = np.random.default_rng(0).integers(-9000, 9000, (4096, channels), np.int16)
    check(in_container("mov", codec, samples), codec, load_audio)


def test_the_damaged_sound_of_a_video(data_dir: Path):
    check((data_dir / "audio_first.mp4").read_bytes(), "video", video_audio)
