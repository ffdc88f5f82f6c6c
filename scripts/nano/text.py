"""The senses of text alone: counting, adding, spelling, repeating, and what was said before.

Held out for the test: the last wordings of each question, every seventh pair of numbers (of a sum, in this order), the
words of every sixth place, and which words are repeated together.
"""

from collections.abc import Sequence

import numpy as np

from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.words import NOUNS, NUMBERS

# The wordings at the end of each list that only the test uses.
HELD_WORDINGS = 3
# The fewest and the most words that are repeated. Those of the test are so many that training hardly draws the same.
REPEATED: dict[Split, tuple[int, int]] = {"train": (1, 5), "test": (3, 5)}
HIGHEST_SUM = 20

COUNT = (
    "Count from {0} to {1}.", "Please count from {0} to {1}.", "Can you count from {0} to {1}?",
    "Count up from {0} to {1}.", "Say the numbers from {0} to {1}.", "Start at {0} and count to {1}.",
    "Name every number from {0} to {1}.", "What are the numbers from {0} to {1}?", "Go from {0} up to {1}.",
    "From {0} to {1}, count.", "Count for me from {0} to {1}.", "Now count from {0} up to {1}.",
    "Which numbers are from {0} to {1}?", "Tell me the numbers from {0} to {1}.", "Begin at {0} and go to {1}.",
    "Write the numbers from {0} to {1}.", "I hear you can count. Go from {0} to {1}.", "Start with {0}, end with {1}.",
    "List all from {0} to {1}.", "Begin with {0} and count up to {1}.",
    "List the numbers from {0} to {1}.", "I want to hear the numbers from {0} to {1}.", "Begin with {0}, count to {1}.",
)  # fmt: skip
ADD = (
    "What is {0} plus {1}?", "How much is {0} plus {1}?", "Add {0} and {1}.", "What do {0} and {1} make?",
    "{0} plus {1} is what?", "Please add {0} and {1}.", "What is the sum of {0} and {1}?", "How much is {0} and {1}?",
    "Can you add {0} to {1}?", "Tell me what {0} plus {1} is.", "Work this out: {0} plus {1}.", "Now add {0} and {1}.",
    "What does {0} plus {1} make?", "Give me the answer to {0} plus {1}.", "I add {0} and {1}. What is it?",
    "The sum of {0} and {1} is what?", "Take {0} and add {1}.", "Say how much {0} and {1} are.",
    "Tell me the sum of {0} and {1}.", "Give me {0} plus {1}.", "Work out {0} plus {1}.",
)  # fmt: skip
SPELL = (
    "Spell the word {0}.", "How do you spell {0}?", "Please spell {0}.", "Which letters are in {0}?",
    "Spell {0} for me.", "Can you spell {0}?", "How is {0} written?", "What is the spelling of {0}?",
    "Give me the letters of {0}.", "Say the letters of {0}.", "Spell this: {0}.", "What are the letters of {0}?",
    "Tell me the letters of {0}.", "Now spell {0}.", "I want to write {0}. How do I spell it?",
    "Say {0} letter by letter.", "{0}, letter by letter.", "Name the letters in {0}.", "How do I write {0}?",
    "Please tell me how you spell {0}.", "In letters, what is {0}?", "Read me the letters of the word {0}.",
    "Write the letters of {0}.", "Write {0} letter by letter.", "How is {0} spelled?",
    "Write down the letters of {0}.", "In which letters do I write {0}?",
    "Say the letters of the word {0}.", "Tell me how to spell {0}.", "Write {0} in letters.",
)  # fmt: skip
REPEAT = (
    "Repeat after me: {0}.", "Say this: {0}.", "Please repeat: {0}.", "Repeat these words: {0}.", "Say after me: {0}.",
    "Can you say this: {0}?", "Say the words {0}.", "Repeat the words {0}.", "Tell me again: {0}.",
    "Now you: {0}.", "Please say: {0}.", "Repeat: {0}.", "{0}. Say it again.", "Can you repeat {0}?",
    "I say {0}. Say it too.", "Say it with me: {0}.", "What do I say? {0}.", "Copy this: {0}.", "Write down: {0}.",
    "Please copy: {0}.", "Give me back these words: {0}.", "These are my words: {0}. Repeat them.",
    "My words are {0}. Now say them.", "Say back to me what I say: {0}.", "I want to hear this again: {0}.",
    "Say it back to me: {0}.", "I say {0}. Now you.", "Copy these words: {0}.",
)  # fmt: skip
TELL = (
    "My word is {0}.", "Remember the word {0}.", "Keep the word {0} in mind.", "The word is {0}.",
    "Please remember {0}.", "I am thinking of {0}.", "Note the word {0}.", "Do not forget {0}.",
    "Here is a word: {0}.", "Remember this: {0}.", "My word: {0}.", "This is my word: {0}.", "I give you the word {0}.",
    "Please keep {0} in mind.", "Learn this word: {0}.", "Do not forget the word {0}.", "I tell you a word: {0}.",
    "{0} is my word.", "Hold on to this word: {0}.", "Store {0} for later.",
    "Store the word {0}.", "Store this word: {0}.", "Store {0}.", "Learn {0}.", "Hold on to {0}.", "Note {0}.",
    "Keep {0}.", "Note this word: {0}.", "Keep my word {0}.", "Learn my word {0}.", "Take the word {0}.",
    "Take this: {0}.", "Store my word: {0}.", "The word to remember is {0}.", "I say {0}. Remember it.",
    "{0}. Please remember this word.",
    "Hold on to the word {0}.", "Learn the word {0}.", "Do not forget this: {0}.",
)  # fmt: skip
RECALL = (
    "Which word did I tell you?", "What was my word?", "Which word was it?", "What did I ask you to remember?",
    "Do you remember my word?", "Say the word from before.", "What word did I give you?", "Tell me my word.",
    "Which word do you remember?", "Tell me the word again.", "What was the word?", "Which word did I say?",
    "Say my word.", "Can you tell me my word?", "What did I tell you?", "Please say my word.", "Recall the word.",
    "Name my word.", "What was the word that I gave you?",
    "What word was that?", "Name the word that I told you.", "Can you recall my word?",
)  # fmt: skip
KEPT = "I will remember it."
# The share of words that are made up, in training; their syllables, and the most letters.
MADE_UP, LONGEST_WORD = 0.7, 10
ONSETS = (
    "",
    *"bcdfghjklmnprstvwyz",
    "bl",
    "br",
    "ch",
    "cl",
    "dr",
    "fl",
    "gr",
    "pl",
    "sh",
    "sp",
    "st",
    "th",
    "tr",
    "qu",
    "x",
)
VOWELS = (*"aeiou", *"aeiou", "ai", "ea", "ee", "oa", "oo", "ou", "ie", "y")
CODAS = ("", "", "", *"bdgklmnprstw", "ck", "ll", "mp", "nd", "ng", "nt", "rd", "rn", "ss", "st", "tch", "x", "zz")


def text_senses(scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses of text; scale: of their numbers of rows."""

    return (
        Sense("count", count, counts(scale, 3000, 200)),
        Sense("add", add, counts(scale, 16_000, 200)),
        Sense("spell", spell, counts(scale, 16_000, 300)),
        Sense("repeat", repeat, counts(scale, 16_000, 300)),
        Sense("remember", remember, counts(scale, 40_000, 300)),
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


def capital(text: str) -> str:
    """A text with its first letter as a capital."""
    return text[0].upper() + text[1:]


def asked(question: str, answer: str, said: str) -> Sample:
    """A conversation of one question of text; said: the whole sentence that answers it."""
    return Sample([user(question), assistant(said)], answer)


def count(draw: np.random.Generator, split: Split) -> Sample:
    """Count up over 3 to 11 numbers; every seventh pair of the first and the last is held out."""
    while True:
        first, last = int(draw.integers(0, 10)), int(draw.integers(2, 20))
        if 2 <= last - first <= 10 and ((3 * first + last) % 7 == 0) == (split == "test"):
            break
    said = ", ".join(NUMBERS[first : last + 1])
    ends = number(draw, first), number(draw, last)
    return asked(wording(draw, COUNT, split).format(*ends), said, capital(said) + ".")


def add(draw: np.random.Generator, split: Split) -> Sample:
    """A sum of at most twenty."""
    while True:
        a, b = (int(x) for x in draw.integers(0, HIGHEST_SUM + 1, 2))
        if a + b <= HIGHEST_SUM and ((3 * a + b) % 7 == 0) == (split == "test"):
            break
    question = wording(draw, ADD, split).format(number(draw, a), number(draw, b))
    said = f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}."
    return asked(capital(question), NUMBERS[a + b], capital(said))


def spell(draw: np.random.Generator, split: Split) -> Sample:
    """The letters of a word."""
    word = a_word(draw, split)
    letters = ", ".join(word)
    question = wording(draw, SPELL, split).format(word)
    return asked(capital(question), letters, capital(letters) + ".")


def repeat(draw: np.random.Generator, split: Split) -> Sample:
    """Words said again: those that there are, in training also words that are made up."""
    known = (*NOUNS, *NUMBERS)
    made = draw.random() if split == "train" else 0.0
    fewest, most = REPEATED[split]
    length = int(draw.integers(fewest, most + 1))
    words = " ".join(made_up(draw) if draw.random() < made else pick(draw, known) for _ in range(length))
    question = wording(draw, REPEAT, split).format(words)
    return asked(capital(question), words, capital(words) + ".")


def remember(draw: np.random.Generator, split: Split) -> Sample:
    """A word that was told before, with nothing or another question in between."""
    word = a_word(draw, split)
    told = wording(draw, TELL, split).format(word)
    between: list = []
    if draw.random() < 0.5:
        between = pick(draw, (add, spell, count))(draw, split).messages
    asked_for, said = user(wording(draw, RECALL, split)), f"Your word is {word}."
    return Sample([user(capital(told)), assistant(KEPT), *between, asked_for, assistant(said)], word)


def a_word(draw: np.random.Generator, split: Split) -> str:
    """A noun of a split, in training also one that is made up."""
    return made_up(draw) if split == "train" and draw.random() < MADE_UP else pick(draw, nouns(split))


def made_up(draw: np.random.Generator) -> str:
    """A word of one to three syllables that is no noun, so that words are read letter by letter."""
    while True:
        syllables = (
            pick(draw, ONSETS) + pick(draw, VOWELS) + pick(draw, CODAS) for _ in range(int(draw.integers(1, 4)))
        )
        word = "".join(syllables)
        if 2 <= len(word) <= LONGEST_WORD and word not in NOUNS:
            return word
