"""Short videos: which way a thing moves, and when one appears; and the bytes of a video with its sound.

Held out for the test: of colour, shape and direction (or second), every seventh combination. Files have 2 to 8 frames a
second and are sampled at 2 to 4, so that only the clock of the video tells the seconds.

A part states the limits `FRAMES`, because frames are otherwise enlarged to 128 tokens for two: with them, a frame keeps
its size, 64 or 96 pixels a side, and a video has at most 40 tokens.
"""

from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np

from scripts.nano.pictures import COLOURS, SHAPES, Thing, background, is_held, render, shown, toned
from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.text import wording
from scripts.nano.voices import RATE
from scripts.nano.words import NUMBERS

FRAMES = {"min_pixels": 64 * 64, "max_pixels": 128 * 128}
MOST_TOKENS = 40
# Frames per second that are sampled; None is the default, two.
SAMPLED = (None, None, 3, 4)
SECONDS = (1, 2, 3, 4)
WAYS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}

WAY = (
    "Which way does the {0} move?", "Where does the {0} move?", "In which direction does the {0} move?",
    "Which way does the {0} go?", "Where does the {0} go?", "Which way is the {0} moving?",
    "Tell me which way the {0} moves.", "Look at the {0}. Which way does it move?", "What does the {0} do?",
    "In which direction is the {0} moving?", "Where does the {0} move to?", "Say where the {0} goes.",
    "Tell me where the {0} is moving.", "Say which way the {0} moves.", "What way does the {0} move?",
    "Look at the {0}. Where does it move?", "Tell me which way the {0} goes.",
    "Tell me where the {0} moves.", "Where is the {0} moving?", "Look at the {0}. Where does it go?",
)  # fmt: skip
MOVES = (
    "What moves?", "Which thing moves?", "What is moving?", "Which thing is moving?", "Tell me what moves.",
    "Name the thing that moves.", "What moves in the video?", "Which of them moves?", "What do you see moving?",
    "Which thing moves in the video?", "Tell me what is moving.", "Say what moves.", "Name what moves.",
    "Which of the things moves?", "Tell me which of them moves.", "Say which thing is moving.",
    "Tell me which thing moves.", "Name the moving thing.", "What is moving in the video?",
)  # fmt: skip
WHEN = (
    "When does the {0} appear?", "When do you see the {0}?", "After how many seconds does the {0} appear?",
    "At which second does the {0} appear?", "How long does it take until the {0} appears?", "When does the {0} come?",
    "Tell me when the {0} appears.", "How many seconds pass until the {0} appears?", "When is the {0} first seen?",
    "Look at the video. When does the {0} appear?", "At which second do you see the {0}?",
    "At which second is the {0} there?", "After how many seconds does the {0} come?", "How long until the {0} comes?",
    "How many seconds pass until the {0} comes?", "Tell me when the {0} comes.", "Tell me when you see the {0}.",
    "When is the {0} there?", "Say at which second the {0} appears.", "Name the second at which the {0} is seen.",
    "Tell me when the {0} is seen.", "After how many seconds is the {0} seen?", "At which second does the {0} come?",
)  # fmt: skip
ASKED = (WAY, MOVES, WHEN)


def video_senses(scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses of silent videos."""
    return Sense("move", move, counts(scale, 6_000, 200)), Sense("when", when, counts(scale, 6_000, 200))


def video_part(name: str, fps: float | None = None, sound: bool = False) -> dict[str, Any]:
    """The part of a message that names a video: frames sampled per second, and whether its sound is heard."""
    rate = {} if fps is None else {"fps": fps}
    return {"type": "video", "video": name, **FRAMES, **rate, **({"use_audio_in_video": True} if sound else {})}


def mp4(frames: list[np.ndarray], rate: int, sound: np.ndarray | None = None) -> bytes:
    """The bytes of an MP4 file, H.264 and AAC: frames uint8 [height, width, 3], sound float32 at 16 kHz."""
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        pictures = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "18"})
        pictures.height, pictures.width = frames[0].shape[:2]
        pictures.pix_fmt, pictures.codec_context.thread_count = "yuv420p", 1
        voice = None if sound is None else container.add_stream("aac", rate=RATE, layout="mono", bit_rate=48_000)
        for frame in frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(pictures.encode(None))
        if voice is not None and sound is not None:
            heard = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = RATE, 0, Fraction(1, RATE)
            container.mux(voice.encode(heard))
            container.mux(voice.encode(None))
    return file.getvalue()


def sampling(draw: np.random.Generator, side: int, seconds: float) -> float | None:
    """Frames per second that are sampled of a video, so that it has few tokens; None for the default."""
    fps = pick(draw, SAMPLED)
    return fps if (side // 32) ** 2 * seconds * (fps or 2) / 2 <= MOST_TOKENS else None


def kind_of(draw: np.random.Generator, split: Split, number: int) -> tuple[str, str]:
    """A colour and a shape that a split combines with a number."""
    while True:
        colour, shape = pick(draw, tuple(COLOURS)), pick(draw, SHAPES)
        if is_held(colour, shape, number) == (split == "test"):
            return colour, shape


def move(draw: np.random.Generator, split: Split) -> Sample:
    """Which way a thing moves, or which of two does."""
    way = int(draw.integers(len(WAYS)))
    x, y = list(WAYS.values())[way]
    colour, shape = kind_of(draw, split, way)
    across = draw.uniform(0.2, 0.8)
    still = [_still(draw, (y, x), across <= 0.5, (colour, shape))] if draw.random() < 0.6 else []
    if still:
        across = draw.uniform(0.2, 0.3) if across <= 0.5 else draw.uniform(0.7, 0.8)
    length, radius = draw.uniform(0.4, 0.64), draw.uniform(0.12, 0.17)
    first = draw.uniform(0.18, 0.82 - length)
    first = first if x + y > 0 else 1 - first
    seconds, rate, side = float(draw.integers(4, 9)) / 2, int(draw.integers(3, 9)), int(pick(draw, (64, 64, 96)))

    def at(time: float) -> Thing:
        along = first + (x + y) * length * time / seconds
        return Thing(colour, shape, along if x else across, along if y else across, radius)

    times = np.arange(round(seconds * rate)) / rate
    frames = filmed(draw, [[*still, at(time)] for time in times], side)
    if still and draw.random() < 0.5:
        question, name = wording(draw, MOVES, split), f"{colour} {shape}"
        said, answer = f"The {name} moves.", name
    else:
        question, where = wording(draw, WAY, split).format(shape), list(WAYS)[way]
        said, answer = f"The {shape} moves {where}.", where.split()[-1]
    return _asked(draw, question, said, answer, frames, rate, sampling(draw, side, seconds))


def _still(draw: np.random.Generator, across: tuple[int, int], high: bool, other: tuple[str, str]) -> Thing:
    """A thing of another colour and shape, on the high or low side of the axis that is 1 in across (x, y)."""
    colour = pick(draw, [name for name in COLOURS if name != other[0]])
    shape = pick(draw, [name for name in SHAPES if name != other[1]])
    far, along = draw.uniform(0.7, 0.82) if high else draw.uniform(0.18, 0.3), draw.uniform(0.2, 0.8)
    return Thing(colour, shape, far if across[0] else along, far if across[1] else along, draw.uniform(0.12, 0.17))


def when(draw: np.random.Generator, split: Split) -> Sample:
    """After how many seconds a thing appears, beside another one or alone; the length of the video does not tell."""
    second = int(pick(draw, SECONDS))
    colour, shape = kind_of(draw, split, second)
    left = draw.random() < 0.5
    thing = Thing(colour, shape, draw.uniform(0.2, 0.32), draw.uniform(0.22, 0.78), draw.uniform(0.14, 0.2))
    things = [thing if left else Thing(colour, shape, 1 - thing.x, thing.y, thing.radius)]
    still = [_still(draw, (1, 0), left, (colour, shape))] if draw.random() < 0.6 else []
    seconds, rate = float(draw.integers(9, 13)) / 2, int(draw.integers(2, 9))
    times = np.arange(round(seconds * rate)) / rate
    frames = filmed(draw, [still + (things if time >= second - 1e-6 else []) for time in times], 64)
    said = f"It appears after {NUMBERS[second]} second{'s' * (second > 1)}."
    question = wording(draw, WHEN, split).format(shape)
    return _asked(draw, question, said, NUMBERS[second], frames, rate, sampling(draw, 64, seconds))


def filmed(draw: np.random.Generator, moments: list[list[Thing]], side: int) -> list[np.ndarray]:
    """Frames uint8 [side, side, 3] of what is there at each moment, on one background."""
    kinds = {thing.name: thing for things in moments for thing in things}
    surface = background(draw, list(kinds.values()), side, side)
    tones = dict(zip(kinds, toned(draw, list(kinds.values())), strict=True))
    return [np.asarray(render(surface, things, [tones[thing.name] for thing in things])) for things in moments]


def _asked(
    draw: np.random.Generator,
    question: str,
    said: str,
    answer: str,
    frames: list[np.ndarray],
    rate: int,
    fps: float | None,
) -> Sample:
    parts = shown(draw, question, video_part("clip.mp4", fps))
    return Sample([user(*parts), assistant(said)], answer, {"clip.mp4": mp4(frames, rate)})
