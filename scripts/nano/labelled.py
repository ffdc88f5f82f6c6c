"""Pictures of which it is known what lies where: what the vision encoder learns from before the Thinker reads it.

    scenery, lettered, digit_picture -> a picture as the model resizes it, and labels of each of its tokens

A picture depends on its number, the split and the seed alone. Each is seen once, so that none is learned by heart.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple
from zlib import crc32

import numpy as np
from PIL import Image

from omni_jax.inputs.image import fit
from omni_jax.inputs.settings import ImageSettings
from scripts.nano.pictures import COLOURS, SHAPES, Thing
from scripts.nano.reading import Lettering, fonts, lettered
from scripts.nano.rows import Split, pick
from scripts.nano.scenes import MOST_THINGS, scenery, things_of
from scripts.nano.text import made_up
from scripts.nano.words import NOUNS, NUMBERS
from scripts.nano.written import digit_picture

# What is known of a token: the colour and the shape of the thing whose centre it holds, and the letter at the middle of
# its left and of its right half. The last class of each is "none".
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(ascii_lowercase) + 1, len(ascii_lowercase) + 1)
UNKNOWN = -1
SHARE = 256
# The share of words, in training, that are made up: letters are read, not words.
MADE_UP = 0.5
# The areas of resized pictures, somewhat larger than the Thinker's; and the share of scenes that are not enlarged, as
# frames of videos are not.
PIXELS = {"min_pixels": 128 * 128, "max_pixels": 192 * 192}
SMALL, SMALL_PIXELS = 0.3, 64 * 64


class Labelled(NamedTuple):
    """A picture uint8 [H, W, 3], the classes of its tokens int8 [h, w, 4], and the digit that it shows.

    UNKNOWN stands for what is not asked: letters of scenes, things of words, and the digit of both.
    """

    pixels: np.ndarray
    tokens: np.ndarray
    digit: int


def pictures(
    directory: Path, split: Split, settings: ImageSettings, seed: int, workers: int, share: int = 0
) -> Iterator[list[Labelled]]:
    """Shares of pictures without end, from number `share` on. directory: where the handwriting is kept."""
    make = partial(make_share, directory, split, settings, seed)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        made = deque(pool.submit(make, share + i) for i in range(2 * workers))
        try:
            while True:
                share += 1
                made.append(pool.submit(make, share + 2 * workers - 1))
                yield made.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def make_share(directory: Path, split: Split, settings: ImageSettings, seed: int, share: int) -> list[Labelled]:
    """The SHARE pictures of a share."""
    return [labelled(directory, split, settings, seed, SHARE * share + i) for i in range(SHARE)]


def labelled(directory: Path, split: Split, settings: ImageSettings, seed: int, number: int) -> Labelled:
    """One picture: a scene, a word or a digit in turn. directory: where the handwriting is kept."""
    draw = np.random.default_rng([seed, crc32(f"sight.{split}".encode()), number])
    kind = number % 3
    if kind == 0:
        things = things_of(draw, split, int(draw.integers(1, MOST_THINGS + 1)))
        height, width = (int(pick(draw, (64, 96, 128))) for _ in range(2))
        small = draw.random() < SMALL
        limits = replace(settings, min_pixels=SMALL_PIXELS) if small else settings
        pixels = fit(np.asarray(scenery(draw, things, height, width)), limits)
        return Labelled(pixels, tokens_of_things(things, _grid(pixels, settings)), UNKNOWN)
    if kind == 1:
        word = made_up(draw) if split == "train" and draw.random() < MADE_UP else pick(draw, (*NOUNS, *NUMBERS))
        family = pick(draw, sorted(fonts(split)))
        picture, lettering = lettered(draw, word, pick(draw, fonts(split)[family]), split == "train")
        pixels = fit(np.asarray(picture), settings)
        return Labelled(pixels, tokens_of_letters(lettering, _grid(pixels, settings)), UNKNOWN)
    digit = int(draw.integers(10))
    with Image.open(BytesIO(digit_picture(draw, digit, split, directory))) as picture:
        pixels = fit(np.asarray(picture.convert("RGB")), settings)
    return Labelled(pixels, np.full((*_grid(pixels, settings), len(CLASSES)), UNKNOWN, np.int8), digit)


def tokens_of_things(things: list[Thing], grid: tuple[int, int]) -> np.ndarray:
    """The classes int8 [h, w, 4] of a scene's tokens."""
    tokens = np.full((*grid, len(CLASSES)), UNKNOWN, np.int8)
    tokens[..., :2] = CLASSES[0] - 1, CLASSES[1] - 1
    for thing in things:
        row, column = int(thing.y * grid[0]), int(thing.x * grid[1])
        tokens[row, column, :2] = tuple(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
    return tokens


def tokens_of_letters(lettering: Lettering, grid: tuple[int, int]) -> np.ndarray:
    """The classes int8 [h, w, 4] of a word's tokens: letters are known in the row of tokens that holds its middle."""
    tokens = np.full((*grid, len(CLASSES)), UNKNOWN, np.int8)
    row = min(max(int(lettering.middle * grid[0]), 0), grid[0] - 1)
    for half in range(2 * grid[1]):
        at = np.searchsorted(lettering.edges, (half + 0.5) / (2 * grid[1]), side="right") - 1
        inside = 0 <= at < len(lettering.text)
        letter = ascii_lowercase.index(lettering.text[at]) if inside else len(ascii_lowercase)
        tokens[row, half // 2, 2 + half % 2] = letter
    return tokens


def _grid(pixels: np.ndarray, settings: ImageSettings) -> tuple[int, int]:
    return pixels.shape[0] // settings.factor, pixels.shape[1] // settings.factor
