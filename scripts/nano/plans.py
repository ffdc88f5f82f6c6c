"""Handwritten digits from plans of strokes, in the forms that other schools teach.

A one has a long nose and a foot, a seven a bar, a nine an open loop and a hooked tail; a four is a bolt of lightning
with a short stroke through it. A plan's strokes go by points named by two figures: the column and the row, 0 to 9; a
point that stands twice is a corner, others are rounded.
"""

import numpy as np
from PIL import Image, ImageDraw

PLANS = (
    ("50 21 04 07 29 59 88 96 93 71 50", "60 31 14 17 39 69 87 84 72 50 20"),
    (
        "50 59", "23 60 60 69", "05 33 60 60 59", "15 60 60 59, 29 99", "23 50 50 59, 19 99", "04 50 50 58",
        "05 60 60 69",
    ),
    ("12 30 70 83 65 28 09 09 99", "12 40 72 74 38 19 19 99", "02 30 60 73 46 18 07 28 59 98", "22 50 72 64 09 09 89"),
    ("11 40 71 73 44 44 75 87 59 19 08", "00 80 80 43 43 75 87 59 08", "12 40 72 53 34 64 86 78 49 18"),
    (
        "60 15 15 95, 73 49", "50 23 06 26 95, 73 58", "50 05 05 95, 61 59", "80 05 05 95, 80 59", "10 05 05 85, 80 79",
        "40 14 05 25 94, 83 65 49", "60 06 06 96, 64 59", "40 15 25 85, 70 75 39",
        "50 05 16 86, 63 49", "60 24 06 26 85, 73 66 49",
    ),
    (
        "11 14 44 76 87 69 29 08, 10 90", "90 10 14 54 86 78 49 08", "22 14 44 75 77 59 18, 31 91",
        "80 20 14 43 75 77 49 19",
    ),
    ("60 33 06 17 39 69 87 66 36 16", "50 13 06 18 49 88 76 45 16", "40 14 07 39 79 86 64 15"),
    (
        "00 90 90 48 39", "00 90 90 39, 25 85", "02 00 90 90 39, 15 75", "02 11 80 92 65 39", "00 80 80 59, 26 95",
        "12 21 71 82 55 39, 15 85",
    ),
    ("71 40 11 23 65 87 69 39 17 25 73 71", "80 40 12 44 77 69 39 17 44 82 80", "81 40 12 45 77 59 28 17 44 90"),
    (
        "81 40 12 14 45 83 81 81 79", "82 50 20 12 23 54 83 81 86 68 39 08", "71 40 12 14 45 73, 80 84 77 49 18",
        "70 30 12 24 54 73, 71 84 77 49 08", "80 30 12 24 54 82 80 75 59",
        "82 40 12 24 64 82 85 78 38 07", "80 50 12 23 55 83, 82 86 78 38 06", "82 60 31 22 34 64 82, 82 86 78 49 18 07",
    ),
)  # fmt: skip
# Pixels of a digit in each direction; how many times finer it is drawn; the standard deviation of how far a point of a
# plan goes astray, in ninths of the digit.
PLANNED, PLANNED_FINER, ASTRAY = 28, 4, 0.45


def planned(draw: np.random.Generator, digit: int) -> np.ndarray:
    """A digit written by one of its plans, float32 [28, 28] of 0 to 1."""
    plans = PLANS[digit]
    plan = plans[int(draw.integers(len(plans)))]
    made = Image.new("L", (PLANNED * PLANNED_FINER, PLANNED * PLANNED_FINER))
    pen, thick = ImageDraw.Draw(made), draw.uniform(1.6, 3.4) * PLANNED_FINER
    size = np.array([draw.uniform(10, 16), 19]) * PLANNED_FINER
    for stroke in plan.split(", "):
        points = np.array([[int(figure) for figure in point] for point in stroke.split()], float)
        astray = np.clip(draw.normal(0, ASTRAY, points.shape), -1, 1)
        # Both halves of a corner go astray together.
        same = np.flatnonzero((points[1:] == points[:-1]).all(1)) + 1
        astray[same] = astray[same - 1]
        places = _rounded((points + astray) / 9 * size + (PLANNED * PLANNED_FINER - size) / 2)
        pen.line([tuple(place) for place in places], 255, round(thick), "curve")
        for x, y in (places[0], places[-1]):
            pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), 255)
    return np.asarray(made.reduce(PLANNED_FINER), np.float32) / 255


def _rounded(points: np.ndarray) -> np.ndarray:
    """A line [points, 2] whose corners are cut three times."""
    for _ in range(3):
        before, after = points[:-1], points[1:]
        cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], 1).reshape(-1, 2)
        points = np.concatenate([points[:1], cut, points[-1:]])
    return points
