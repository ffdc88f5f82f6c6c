"""What is seen and heard together: flash and beep, the digit while the square is red, a written and a spoken digit.

| sense | held out for the test |
|---|---|
| flash | beeps of 700 to 1000 Hz; of the colours of flash and background, every fifth pair |
| red | of the digit and the number of the red part, every seventh combination; voices, as `say` splits them |
| same | of written and spoken digits that differ, every seventh pair; the collection of digits; voices |

`say(draw, digit, split)` speaks a digit, float32 at 16 kHz. Videos with sound state `use_audio_in_video`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scripts.nano.augment import fitted
from scripts.nano.hear import PITCHES, apart
from scripts.nano.pictures import COLOURS, Thing, background, picture_part, shown
from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.sounds import wav
from scripts.nano.text import a_word, capital, wording
from scripts.nano.videos import RATE, filmed, mp4, sampling, video_part
from scripts.nano.words import DIGITS, NUMBERS
from scripts.nano.written import digit_picture

Say = Callable[[np.random.Generator, int, Split], np.ndarray]

FLASH = (
    "Which came first, the flash or the beep?", "Was the flash or the beep first?", "What came first?",
    "Did the flash or the beep come first?", "Which was first, the beep or the flash?",
    "What was first, flash or beep?",
    "Tell me which came first, the beep or the flash.", "Is the flash before the beep, or the beep before the flash?",
    "Which of them came first, the flash or the beep?", "What did you notice first, the beep or the flash?",
    "Tell me what was first, the flash or the beep.", "Did the beep or the flash come first?",
    "Which came first, the beep or the flash?",
)  # fmt: skip
RED = (
    "Which digit is said while the square is red?", "What is said while the square is red?",
    "Which digit do you hear while the square is red?", "The square is red. Which digit is said then?",
    "Which number is said when the square is red?", "What do you hear when the square is red?",
    "Tell me the digit that is said while the square is red.", "While the square is red, which digit is said?",
    "When the square is red, what is said?", "Which digit is said when the square is red?",
    "While the square is red, which number do you hear?", "Tell me the digit that you hear when the square is red.",
)  # fmt: skip
SAME = (
    "Is the written digit the one that is said?", "Are the written and the spoken digit the same?",
    "Is the same digit written and said?", "Do you see the digit that you hear?", "Do you hear the digit that you see?",
    "Is it the same digit in the picture and in the recording?", "Does the recording say what the picture shows?",
    "Does the picture show the digit that is said?", "Compare the digits. Are they the same?",
    "Tell me if the digits are the same.",
    "Tell me if the written digit is the spoken one.", "Tell me if you see and hear the same digit.",
    "Are both digits the same?", "Look and listen. Is it the same digit?", "Tell me if the picture shows what is said.",
    "Is the spoken digit the written one?", "Say if the recording has the digit of the picture.",
    "Tell me if both are the same digit.", "Is what you see the digit that you hear?",
    "Is the digit that is said the one in the picture?", "Compare the picture and the recording. Is it the same digit?",
    "Tell me if the digit in the picture is the one that is said.",
)  # fmt: skip
# In training a third of the questions whether both are the same name two words instead: of the digits alone it learned
# the pairs by heart, and took those held out for the same.
WORDS = 1 / 3
OF_WORDS = (
    "{0} is written and {1} is said. Are they the same?", "I write {0} and say {1}. Is it the same?",
    "Is {0}, which is written, the same as {1}, which is said?", "{0} is written, {1} is said. Is that the same?",
    "The written word is {0}, the spoken word is {1}. Are they the same?",
)  # fmt: skip
ASKED = (FLASH, RED, SAME)


def both_senses(directory: Path, say: Say, scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses of what is seen and heard; directory: where the written digits are kept."""
    return (
        Sense("flash", flash, counts(scale, 5_000, 200)),
        Sense("red", partial(red, say), counts(scale, 6_000, 200), ("voices",)),
        Sense("same", partial(same, say, directory), counts(scale, 22_000, 300), ("voices", "handwriting")),
    )


def flash(draw: np.random.Generator, split: Split) -> Sample:
    """Whether a flash of light or a beep came first, with at least eight tenths of a second between."""
    seconds, rate = int(draw.integers(3, 5)), int(draw.integers(4, 9))
    first = draw.uniform(0.2, seconds - 1.8)
    second = draw.uniform(first + 0.8, seconds - 0.7)
    is_flash = draw.random() < 0.5
    lit, heard = (first, second) if is_flash else (second, first)
    while True:
        dark, light = draw.integers(0, 8, 2)
        if ((dark + 2 * light) % 5 == 0) == (split == "test"):
            break
    surface = background(draw, [], 64, 64) * (0.25 + 0.05 * dark)
    bright = surface + (255 - surface) * (0.65 + 0.05 * light)
    length = draw.uniform(0.65, 0.9)
    times = np.arange(round(seconds * rate)) / rate
    frames = [(bright if lit <= time + 0.5 / rate < lit + length else surface).astype(np.uint8) for time in times]
    sound = faint_noise(draw, seconds)
    put(sound, short_beep(draw, split), heard)
    what = "flash" if is_flash else "beep"
    parts = shown(draw, wording(draw, FLASH, split), video_part("clip.mp4", sampling(draw, 64, seconds), True))
    return Sample([user(*parts), assistant(f"The {what} came first.")], what, {"clip.mp4": mp4(frames, rate, sound)})


def short_beep(draw: np.random.Generator, split: Split) -> np.ndarray:
    """A tone of a third of a second or so, float32 [samples] at 16 kHz."""
    pitch = apart(draw, split, 300, 2400, PITCHES)
    times = np.arange(int(draw.uniform(0.2, 0.45) * RATE)) / RATE
    tone = np.sin(2 * np.pi * pitch * times) + draw.uniform(0, 0.4) * np.sin(6 * np.pi * pitch * times)
    ramp = np.clip(np.minimum(times, times[::-1]) / 0.01, 0, 1)
    return (tone * ramp * draw.uniform(0.15, 0.6)).astype(np.float32)


def red(say: Say, draw: np.random.Generator, split: Split) -> Sample:
    """Which of two or three spoken digits is said while a square is red."""
    number, rate = int(pick(draw, (2, 3))), int(draw.integers(4, 9))
    digits = draw.permutation(10)[:number].tolist()
    place = int(draw.integers(number))
    if ((digits[place] + 3 * place + number) % 7 == 0) != (split == "test"):
        return red(say, draw, split)
    others = [name for name in COLOURS if name not in ("red", "orange")]
    colours = draw.permutation(others)[:number].tolist()
    colours[place] = "red"
    part = draw.uniform(1.0, 1.3)
    # A place is drawn for every colour, and that of the first is all colours': the draws stay those of rows that exist.
    (x, y, radius), *_ = [
        (draw.uniform(0.38, 0.62), draw.uniform(0.38, 0.62), draw.uniform(0.24, 0.36)) for _ in colours
    ]
    moved = [Thing(colour, "square", x, y, radius) for colour in colours]
    times = np.arange(round(number * part * rate)) / rate
    frames = filmed(draw, [[moved[min(int(time / part + 1e-6), number - 1)]] for time in times], 64)
    sound = faint_noise(draw, len(frames) / rate)
    for i, digit in enumerate(digits):
        spoken = fitted(say(draw, digit, split), 0.9 * part)
        put(sound, spoken, i * part + draw.uniform(0.03, 0.97) * max(part - len(spoken) / RATE, 0))
    said = DIGITS[digits[place]]
    parts = shown(draw, wording(draw, RED, split), video_part("clip.mp4", sound=True))
    return Sample([user(*parts), assistant(f"The digit is {said}.")], said, {"clip.mp4": mp4(frames, rate, sound)})


def same(say: Say, directory: Path, draw: np.random.Generator, split: Split) -> Sample:
    """Whether a written digit is the one that is said; the answer names both first (see scenes.py)."""
    if split == "train" and draw.random() < WORDS:
        return same_words(draw)
    is_same = draw.random() < 0.5
    while True:
        seen, heard = draw.integers(0, 10, 2).tolist()
        heard = seen if is_same else heard
        if is_same or seen != heard and _is_held(seen, heard) == (split == "test"):
            break
    picture = digit_picture(draw, seen, split, directory)
    spoken = say(draw, heard, split)
    sound = faint_noise(draw, len(spoken) / RATE + draw.uniform(0.15, 0.6))
    put(sound, spoken, draw.uniform(0.02, 0.98) * (len(sound) - len(spoken)) / RATE)
    media = [picture_part("digit.png"), {"type": "audio", "audio": "digit.wav"}]
    parts = shown(draw, wording(draw, SAME, split), *(media if draw.random() < 0.5 else media[::-1]))
    files = {"digit.png": picture, "digit.wav": wav(sound, RATE)}
    return Sample([user(*parts), _compared(DIGITS[seen], DIGITS[heard])], "yes" if is_same else "no", files)


def same_words(draw: np.random.Generator) -> Sample:
    """Whether two numbers or two other words, which the question names, are the same; no pair of digits of the test."""
    is_same, of_numbers = draw.random() < 0.5, draw.random() < 0.5
    while True:
        seen, heard = (pick(draw, NUMBERS) if of_numbers else a_word(draw, "train") for _ in range(2))
        heard = seen if is_same else heard
        digits = [DIGITS.index(word) for word in (seen, heard) if word in DIGITS]
        if is_same or seen != heard and not (len(digits) == 2 and _is_held(*digits)):
            break
    question = capital(pick(draw, OF_WORDS).format(seen, heard))
    return Sample([user(question), _compared(seen, heard)], "yes" if is_same else "no")


def _is_held(seen: int, heard: int) -> bool:
    """Whether two different digits, written and spoken, are compared in the test alone."""
    return (seen + 3 * heard) % 7 == 0


def _compared(seen: str, heard: str) -> dict[str, Any]:
    """The answer: what is written, what is said, and whether they are the same.

    Both words have the same tokens wherever they are the same: a capital letter would make the first another one.
    """
    found = "yes, they are the same" if seen == heard else "no, they are not the same"
    return assistant(f"I see {seen} and hear {heard}: {found}.")


def faint_noise(draw: np.random.Generator, seconds: float) -> np.ndarray:
    """Faint noise, float32 [samples] at 16 kHz."""
    return draw.normal(0, 10 ** draw.uniform(-4, -2.3), round(seconds * RATE)).astype(np.float32)


def put(sound: np.ndarray, other: np.ndarray, second: float) -> None:
    """Add a sound [samples] to another one at a moment; what is beyond its end is lost."""
    start = round(second * RATE)
    end = min(start + len(other), len(sound))
    sound[start:end] += other[: end - start]
