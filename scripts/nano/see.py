"""All senses of pictures and videos, and every sentence that they ask and answer in training."""

from pathlib import Path

from scripts.nano import both, reading, recall, scenes, videos, written
from scripts.nano.rows import Sense
from scripts.nano.text import trained_on


def see_senses(directory: Path, say: both.Say, scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses; directory: where downloads are kept. say: speaks a digit. scale: of numbers of rows."""
    return (
        written.written_sense(directory, scale),
        *scenes.scene_senses(scale),
        reading.reading_sense(scale),
        *videos.video_senses(scale),
        *both.both_senses(directory, say, scale),
        recall.recall_sense(directory, scale),
    )


def see_questions() -> list[tuple[str, ...]]:
    """The wordings of each question; the last ones of each are only the test's."""
    return [written.WRITTEN, *scenes.ASKED, reading.READ, *videos.ASKED, *both.ASKED, *recall.ASKED]


def see_wordings() -> list[str]:
    """Every question that is asked in training, and what its answers are made of."""
    return [*trained_on(*see_questions()), *both.OF_WORDS, *ANSWERS]


ANSWERS = (
    "The digit is", "It says '", "There are no", "There is one", "There are two", "The circle is red.",
    "A blue square is left of the triangle.", "A yellow star is right of the ring.",
    "A green circle is above the square.",
    "A black triangle is below the star.", "An orange ring is in the middle.", "A purple circle is at the top left.",
    "A white star is at the bottom right.", "A red square is on the left.", "A red square is on the right.",
    "circles", "squares", "triangles", "stars", "rings", "red things", "blue things", "Yes, there is a",
    "No, there is no", "the first picture has more things.", "the second picture has the most things.",
    "the third picture", "yes, they show the same.", "no, they are not the same.", "the colour is different.",
    "the shape is different.", "the place is different.", "One thing, then two things:",
    "A red ring is first, then a star is second:",
    "The ring moves to the left.", "The star moves to the right.", "The square moves up.",
    "The triangle moves down.", "It appears after one second.", "It appears after two seconds.",
    "The flash came first.", "It was a red circle.", "It was an orange square.",
    "The beep came first.", "I see seven and hear two: no, they are not the same.", "yes, they are the same.",
)  # fmt: skip
