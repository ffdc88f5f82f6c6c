"""What was shown in an earlier turn: a handwritten digit or a coloured thing, after none or one other turn."""

from functools import partial
from pathlib import Path

import numpy as np

from scripts.nano import scenes
from scripts.nano.pictures import article, background, picture_part, png, render, shown, toned
from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.text import KEPT, add, count, spell, wording
from scripts.nano.words import DIGITS
from scripts.nano.written import digit_picture, written

TELL_PICTURE = (
    "Remember this picture.", "Keep this picture in mind.", "Please remember what you see.", "Remember what is shown.",
    "Do not forget this picture.", "Here is a picture to remember.", "Please look at this and remember it.",
    "I will ask you about this picture later.", "Hold on to this picture.",
    "Remember what is shown here.", "Please keep this picture in mind.", "Here is my picture.",
)  # fmt: skip
RECALL_DIGIT = (
    "Which digit did I show you first?", "What digit was in the first picture?", "Which digit did you see first?",
    "Do you remember the digit that I showed you?", "Tell me the digit of the first picture.",
    "Which digit was written in the first picture?", "What was the digit that I showed you?",
    "Can you recall the digit in the first picture?", "Say the digit that you saw first.",
    "Which digit was in my first picture?", "What digit did I show you?", "Name the digit of the first picture.",
)  # fmt: skip
RECALL_THING = (
    "What did I show you first?", "What was in the first picture?", "What did you see first?",
    "Do you remember what I showed you?", "Tell me what was in the first picture.", "Which thing did I show you first?",
    "What was the thing that I showed you?", "Can you recall what was in the first picture?",
    "Say what you saw first.",
    "What was in my first picture?", "Which thing was in the first picture?", "Name the thing of the first picture.",
)  # fmt: skip
ASKED = (TELL_PICTURE, RECALL_DIGIT, RECALL_THING)
SIDE = 64


def recall_sense(directory: Path, scale: float = 1.0) -> Sense:
    """The sense of what was shown; directory: where the collection of digits is kept."""
    return Sense("shown", partial(recall, directory), counts(scale, 6_000, 300), ("handwriting",))


def recall(directory: Path, draw: np.random.Generator, split: Split) -> Sample:
    """A picture seen before, with nothing, a question of text or another picture in between."""
    if draw.random() < 0.5:
        digit = int(draw.integers(10))
        picture, answer = digit_picture(draw, digit, split, directory), DIGITS[digit]
        question, said = RECALL_DIGIT, f"The first digit was {answer}."
    else:
        (thing,) = scenes.things_of(draw, split, 1)
        surface = background(draw, [thing], SIDE, SIDE)
        picture, answer = png(render(surface, [thing], toned(draw, [thing]))), thing.name
        question, said = RECALL_THING, f"It was {article(answer)}."
    media = {"first.png": picture}
    told = user(*shown(draw, wording(draw, TELL_PICTURE, split), picture_part("first.png")))
    between: list = []
    chance = draw.random()
    if chance < 0.35:
        between = pick(draw, (add, spell, count))(draw, split).messages
    elif chance < 0.7:
        other = written(directory, draw, split)
        between, media = other.messages, media | other.media
    recalled = user(wording(draw, question, split)), assistant(said)
    return Sample([told, assistant(KEPT), *between, *recalled], answer, media)
