"""What pictures and videos are drawn from: colours, shapes, backgrounds, and the bytes of their files."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS = {
    "red": (214, 36, 40), "green": (38, 160, 62), "blue": (36, 78, 214), "yellow": (244, 214, 36),
    "black": (22, 22, 24), "white": (248, 248, 248), "orange": (246, 132, 20), "purple": (138, 50, 176),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring")
# What no colour of a thing comes near to, on a background.
CONTRAST = 110
# Shapes are drawn so many times larger, then reduced.
FINER = 3


@dataclass(frozen=True)
class Thing:
    """A coloured shape: its centre (0 to 1, from left and top), and its radius in shorter sides of the picture."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.colour} {self.shape}"


def is_held(colour: str, shape: str, number: int) -> bool:
    """Whether a colour and a shape together with a number, as of a place or a direction, are only the test's."""
    return (tuple(COLOURS).index(colour) + 2 * SHAPES.index(shape) + 3 * number) % 7 == 0


def article(name: str) -> str:
    """A name with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def shown(draw: np.random.Generator, question: str, *media: dict[str, Any]) -> list[Any]:
    """The parts of a question about media, which come first in three of four."""
    return [*media, question] if draw.random() < 0.75 else [question, *media]


def picture_part(name: str) -> dict[str, Any]:
    """The part of a message that names a picture."""
    return {"type": "image", "image": name}


def paper(
    draw: np.random.Generator, height: int, width: int, colour: np.ndarray | Sequence[float], rough: float
) -> np.ndarray:
    """A surface float32 [height, width, 3], 0 to 255: a colour with a gradient, spots and noise of `rough` each."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    slope = draw.uniform(-rough, rough, 2)
    spots = draw.normal(0, 0.6 * rough, (height // 16 + 1, width // 16 + 1)).astype(np.float32)
    spots = np.asarray(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC))
    light = x * slope[0] + y * slope[1] + spots
    noise = draw.normal(0, 0.25 * rough, (height, width, 3))
    return np.clip(np.asarray(colour) + light[..., None] + noise, 0, 255).astype(np.float32)


def background(draw: np.random.Generator, things: Sequence[Thing], height: int, width: int) -> np.ndarray:
    """A plain or textured surface uint8 [height, width, 3] on which all things are seen."""
    taken = np.array([COLOURS[thing.colour] for thing in things], np.float64).reshape(-1, 3)
    while True:
        colour = draw.uniform(20, 245) + draw.uniform(-25, 25, 3)
        if (np.linalg.norm(taken - colour, axis=1) > CONTRAST).all():
            break
    rough = 0.0 if draw.random() < 0.4 else draw.uniform(2, 12)
    return paper(draw, height, width, colour, rough).astype(np.uint8)


def render(surface: np.ndarray, things: Sequence[Thing], tones: Sequence[tuple[int, ...]] = ()) -> Image.Image:
    """Things on a surface uint8 [height, width, 3]; tones: their colours, if not the plain ones of their names."""
    height, width = surface.shape[:2]
    large = Image.fromarray(surface).resize((FINER * width, FINER * height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for i, thing in enumerate(things):
        _draw(pen, thing, tones[i] if tones else COLOURS[thing.colour], FINER * height, FINER * width)
    return large.reduce(FINER)


def toned(draw: np.random.Generator, things: Sequence[Thing]) -> list[tuple[int, ...]]:
    """A colour near to that of each thing."""
    near = [np.array(COLOURS[thing.colour]) + draw.integers(-14, 15, 3) for thing in things]
    return [tuple(int(value) for value in np.clip(colour, 0, 255)) for colour in near]


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    file = BytesIO()
    picture.save(file, "PNG", compress_level=3)
    return file.getvalue()


def blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """A plane float32 [height, width] of 0 to 1, blurred."""
    plane = Image.fromarray(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8))
    return np.asarray(plane.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def _draw(pen: ImageDraw.ImageDraw, thing: Thing, colour: tuple[int, ...], height: int, width: int) -> None:
    x, y, radius = thing.x * width, thing.y * height, thing.radius * min(height, width)
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.42 * radius))
    elif thing.shape == "square":
        side = 0.88 * radius
        pen.rectangle((x - side, y - side, x + side, y + side), fill=colour)
    else:
        radii = [radius] * 3 if thing.shape == "triangle" else [radius, 0.42 * radius] * 5
        angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
        lower = 0.2 * radius if thing.shape == "triangle" else 0.0
        pen.polygon(
            [(x + r * np.sin(a), y + lower - r * np.cos(a)) for r, a in zip(radii, angles, strict=True)], fill=colour
        )
