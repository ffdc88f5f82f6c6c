"""Videos, frames and options of them that do not fit each other, the context or the memory."""

from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from tests.bad_inputs.case import Case

FILM = str(Path(__file__).resolve().parents[1] / "data" / "hello_with_speech.mp4")  # 211 frames, 7.03 s, 320 x 180
PIXELS = np.zeros((64, 64, 3), np.uint8)


def _film(name: str, options: dict, *words: str, video: Any = FILM, **settings: Any) -> Case:
    def act(_: Path, world: Any) -> None:
        part = {"type": "video", "video": video, **options}
        world.omni.prepare([{"role": "user", "content": [part]}], **settings)

    return Case(f"video: {name}", act, ("message 0, part 0", *words), InputError)


def _frames(name: str, frames: Any, *words: str, **options: Any) -> Case:
    return _film(name, options, *words, video=frames)


CASES = [
    _film("more frames than it has", {"nframes": 300}, "'nframes' is 300", "it has 211", "from 2"),
    _film("a single frame", {"nframes": 1}, "'nframes' is 1, taken as 0", "from 2"),
    _film("a span after its end", {"video_start": 8}, "no frame from 8 s", "from 0 to 7"),
    _film("a span between two frames", {"video_start": 1.01, "video_end": 1.02}, "no frame from 1.01 s to 1.02 s"),
    _film("most below least", {"max_pixels": 65536}, "'max_pixels' is 65536", "131072", "smaller 'min_pixels'"),
    _film("a rate of a million", {"fps": 10**6}, "fps 1000000", "between"),
    _film("a rate of a frame in a year", {"fps": 1e-7}, "fps 1e-07", "between"),
    _film(
        "more tokens than the context",
        {"nframes": 210, "min_pixels": 786432},
        "tokens",
        "left of the context",
        "nframes",
    ),
    _film("frames of 10^12 pixels", {"min_pixels": 1e12}, "tokens", "left of the context"),
    _film(
        "stated sides of 10^6", {"resized_height": 10**6, "resized_width": 10**6, "nframes": 200}, "left of the context"
    ),
    _film("a thread of pixels", {"resized_height": 1, "resized_width": 900}, "200 times", "crop"),
    _film("a rate of a file that is of frames", {"sample_fps": 2}, "'sample_fps'", "fps"),
    _frames("no frames", [], "without frames"),
    _frames("frames of two shapes", [PIXELS, np.zeros((64, 128, 3), np.uint8)], "frame 1", "128 x 64", "one size"),
    _frames("a frame that is a number", [PIXELS, 3], "image of type int"),
    _frames("a frame of floats", [PIXELS / 255.0], "uint8"),
    _frames("a frame that is not there", ["/no/such.png"], "/no/such.png", "no such file"),
    _frames("a frame that is none", [b"GIF, not quite"], "cannot be read"),
    _frames("a picture's bytes as frames", [PIXELS] * 769, "769 frames", "768"),
    _frames("frames sampled twice", [PIXELS, PIXELS], "'nframes'", "sampled already", nframes=2),
    _frames("a span of frames", [PIXELS, PIXELS], "'video_start'", "sampled already", video_start=1),
    _frames(
        "an array sampled twice", np.zeros((4, 64, 64, 3), np.uint8), "'max_frames'", "already", fps=2, max_frames=2
    ),
    _frames("an array without a rate", np.zeros((4, 64, 64, 3), np.uint8), "without fps"),
    _frames("a tuple of nothing", (None,), "NoneType"),
    _frames("a set of frames", {1, 2}, "of type set", "list of frames"),
]
