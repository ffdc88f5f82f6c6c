"""The senses of text alone: counting, adding, spelling, repeating, and what was said before.

Held out for the test: the last wordings of each question, every seventh pair of numbers, the words of every sixth
place, and which words stand together.
"""

from collections.abc import Sequence

import numpy as np

from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.words import NOUNS, NUMBERS

# The wordings at the end of each list that only the test uses.
HELD_WORDINGS = 3
HIGHEST_SUM = 20

COUNT = (
    "Count from {0} to {1}.", "Please count from {0} to {1}.", "Can you count from {0} to {1}?",
    "Count up from {0} to {1}.", "Say the numbers from {0} to {1}.", "Start at {0} and count to {1}.",
    "Name every number from {0} to {1}.", "What are the numbers from {0} to {1}?", "Go from {0} up to {1}.",
    "List the numbers from {0} to {1}.", "I want to hear the numbers from {0} to {1}.", "Begin with {0}, count to {1}.",
)  # fmt: skip
ADD = (
    "What is {0} plus {1}?", "How much is {0} plus {1}?", "Add {0} and {1}.", "What do {0} and {1} make?",
    "{0} plus {1} is what?", "Please add {0} and {1}.", "What is the sum of {0} and {1}?", "How much is {0} and {1}?",
    "Can you add {0} to {1}?", "Tell me the sum of {0} and {1}.", "Give me {0} plus {1}.", "Work out {0} plus {1}.",
)  # fmt: skip
SPELL = (
    "Spell the word {0}.", "How do you spell {0}?", "Please spell {0}.", "Which letters are in {0}?",
    "Spell {0} for me.", "Can you spell {0}?", "How is {0} written?", "What is the spelling of {0}?",
    "Give me the letters of {0}.", "Say the letters of {0}.", "Tell me how to spell {0}.", "Write {0} in letters.",
)  # fmt: skip
REPEAT = (
    "Repeat after me: {0}.", "Say this: {0}.", "Please repeat: {0}.", "Repeat these words: {0}.", "Say after me: {0}.",
    "Can you say this: {0}?", "Say the words {0}.", "Repeat the words {0}.", "Tell me again: {0}.",
    "Say it back to me: {0}.", "I say {0}. Now you.", "Copy these words: {0}.",
)  # fmt: skip
TELL = (
    "My word is {0}.", "Remember the word {0}.", "Keep the word {0} in mind.", "The word is {0}.",
    "Please remember {0}.", "I am thinking of {0}.", "Note the word {0}.", "Do not forget {0}.",
    "Here is a word: {0}.", "Hold on to the word {0}.", "Learn the word {0}.", "Store the word {0}.",
)  # fmt: skip
RECALL = (
    "Which word did I tell you?", "What was my word?", "Which word was it?", "What did I ask you to remember?",
    "Do you remember my word?", "Say the word from before.", "What word did I give you?", "Tell me my word.",
    "Which word do you remember?", "What word was that?", "Name the word that I told you.", "Can you recall my word?",
)  # fmt: skip
KEPT = "I will remember it."


def text_senses(scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses of text; scale: of their numbers of rows."""

    return (
        Sense("count", count, counts(scale, 3000, 200)),
        Sense("add", add, counts(scale, 4000, 200)),
        Sense("spell", spell, counts(scale, 6000, 300)),
        Sense("repeat", repeat, counts(scale, 8000, 300)),
        Sense("remember", remember, counts(scale, 6000, 300)),
    )


def wordings() -> list[str]:
    """Every question that is asked in training, and what its answers are made of."""
    return [*trained_on(COUNT, ADD, SPELL, REPEAT, TELL, RECALL), KEPT, "Your word is"]


def trained_on(*questions: Sequence[str]) -> list[str]:
    """The wordings of questions that are no test's."""
    return [one for choices in questions for one in choices[:-HELD_WORDINGS]]


def wording(draw: np.random.Generator, choices: Sequence[str], split: Split) -> str:
    """One wording of a question; the last ones are only the test's."""
    return pick(draw, choices[-HELD_WORDINGS:] if split == "test" else choices[:-HELD_WORDINGS])


def number(draw: np.random.Generator, value: int) -> str:
    """A number as the user writes it, a word or digits."""
    return pick(draw, (NUMBERS[value], str(value)))


def nouns(split: Split) -> tuple[str, ...]:
    """The words of a split."""
    return tuple(noun for i, noun in enumerate(NOUNS) if (i % 6 == 5) == (split == "test"))


def asked(question: str, answer: str, said: str) -> Sample:
    """A conversation of one question of text; said: the whole sentence that answers it."""
    return Sample([user(question), assistant(said)], answer)


def count(draw: np.random.Generator, split: Split) -> Sample:
    """Counting up, at most twelve numbers; where a count begins is no other than in training, its end is."""
    first, length = int(draw.integers(0, 10)), int(draw.integers(3, 12))
    if (first + length) % 5 == 4 and split == "train" or (first + length) % 5 != 4 and split == "test":
        return count(draw, split)
    said = ", ".join(NUMBERS[first : first + length])
    ends = number(draw, first), number(draw, first + length - 1)
    return asked(wording(draw, COUNT, split).format(*ends), said, said[0].upper() + said[1:] + ".")


def add(draw: np.random.Generator, split: Split) -> Sample:
    """A sum of at most twenty."""
    a, b = (int(x) for x in draw.integers(0, HIGHEST_SUM + 1, 2))
    if a + b > HIGHEST_SUM or ((3 * max(a, b) + min(a, b)) % 7 == 0) != (split == "test"):
        return add(draw, split)
    question = wording(draw, ADD, split).format(number(draw, a), number(draw, b))
    said = f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}."
    return asked(question[0].upper() + question[1:], NUMBERS[a + b], said[0].upper() + said[1:])


def spell(draw: np.random.Generator, split: Split) -> Sample:
    """The letters of a word."""
    noun = pick(draw, nouns(split))
    letters = ", ".join(noun)
    return asked(wording(draw, SPELL, split).format(noun), letters, letters[0].upper() + letters[1:] + ".")


def repeat(draw: np.random.Generator, split: Split) -> Sample:
    """One to five words, of all that there are, said again."""
    words = " ".join(pick(draw, (*NOUNS, *NUMBERS)) for _ in range(int(draw.integers(1, 6))))
    return asked(wording(draw, REPEAT, split).format(words), words, words[0].upper() + words[1:] + ".")


def remember(draw: np.random.Generator, split: Split) -> Sample:
    """A word that was told before, with nothing or another question in between."""
    noun = pick(draw, nouns(split))
    told = user(wording(draw, TELL, split).format(noun))
    between: list = []
    if draw.random() < 0.5:
        between = pick(draw, (add, spell, count))(draw, split).messages
    said = f"Your word is {noun}."
    return Sample([told, assistant(KEPT), *between, user(wording(draw, RECALL, split)), assistant(said)], noun)
