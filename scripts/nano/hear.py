"""The senses of sound: one digit, strings of digits, what is no speech, and a digit heard in an earlier turn.

Held out for the test: voices and strings of digits (`voices`), the last wordings of each question, and of what is no
speech some pitches, keys and slopes (`no_speech`). A file is named after its voice, so that accuracy can be told by
voice.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from scripts.nano.augment import beep, hiss, hum, leveled, mild, music, other_voice, placed, varied
from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.sounds import wav
from scripts.nano.text import KEPT, add, count, spell, trained_on, wording
from scripts.nano.voices import RATE, Bank, Voice, draw_string
from scripts.nano.words import DIGITS

DIGIT = (
    "Which digit is said?", "What digit do you hear?", "Which number is spoken?", "What is the digit?",
    "Tell me the digit that is said.", "Which digit is this?", "What number is said here?", "Name the spoken digit.",
    "Listen: which digit is it?", "Please say which digit you hear.", "What digit does the voice say?",
    "Which digit is spoken?", "What is the number that you hear?", "Name the digit that is said.",
)  # fmt: skip
STRING = (
    "Which digits are said?", "What digits do you hear?", "Which numbers are spoken?", "What are the digits?",
    "Tell me the digits in order.", "List the digits that you hear.", "Name all spoken digits.",
    "Write down the digits.", "Listen: which digits are they?", "Please say which numbers you hear.",
    "Which digits does the voice say, in order?",
    "Which digits are spoken?", "Name all digits that you hear.", "Tell me which numbers are said.",
)  # fmt: skip
SOUND = (
    "What do you hear?", "What is this sound?", "What is in this recording?", "Tell me what you hear.",
    "Can you hear something?", "Listen: what is it?", "Is anyone speaking?", "Please describe the sound.",
    "What can you hear in the recording?",
    "What is it that you hear?", "Please tell me what you can hear.", "What sound is in this recording?",
)  # fmt: skip
TELL_SOUND = (
    "Remember this digit.", "Keep this digit in mind.", "Please remember what you hear.", "Do not forget this digit.",
    "Here is a digit to remember.", "This is my digit.", "Listen and remember.", "Hold on to this digit.",
    "I will ask you about this digit later.",
    "Please keep this in mind.", "Here is my digit.", "Remember what you hear.",
)  # fmt: skip
RECALL_SOUND = (
    "Which digit did I ask you to remember?", "What was my digit?", "Which digit did you hear first?",
    "Do you remember my digit?", "What digit was in the first recording?", "Tell me the first digit again.",
    "Which digit came first?", "Say the digit from the beginning.", "Can you recall the first digit?",
    "Which digit was my first?", "What was the first digit?", "Tell me the digit from the first recording.",
)  # fmt: skip

# Of the test alone: pitches of beeps and lowest notes of music in hertz, and slopes of noise.
PITCHES, KEYS, SLOPES = (700.0, 1000.0), (250.0, 330.0), (0.4, 0.6)


def hear_senses(bank: Bank, scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses of sound, of the clips of a bank; scale: of their numbers of rows."""
    return (
        Sense("digit", partial(digit, bank), counts(scale, 20_000, 600), ("voices",)),
        Sense("digits", partial(digits, bank), counts(scale, 20_000, 400), ("voices",)),
        Sense("silence", partial(silence, bank), counts(scale, 8000, 200), ("voices",)),
        Sense("heard", partial(heard, bank), counts(scale, 4000, 200), ("voices",)),
    )


def wordings() -> list[str]:
    """Every question that is asked in training, and what its answers are made of."""
    asked = trained_on(DIGIT, STRING, SOUND, TELL_SOUND, RECALL_SOUND)
    said = ("The digit is", "I hear silence.", "I hear noise.", "I hear a beep.", "I hear music.", "I hear someone say")
    return [*asked, *said, "The first digit was"]


def digit(bank: Bank, draw: np.random.Generator, split: Split) -> Sample:
    """One digit, said by one voice."""
    word, name, content = _spoken_digit(bank, draw, split)
    question = user(_audio(name), wording(draw, DIGIT, split))
    return Sample([question, assistant(f"The digit is {word}.")], word, {name: content})


def digits(bank: Bank, draw: np.random.Generator, split: Split) -> Sample:
    """Two to five digits of one voice, one after another or, where the voice has such clips, in one breath."""
    voice = bank.voice(draw, split)
    if (breaths := bank.strings(voice)) and draw.random() < 0.35:
        string = pick(draw, breaths)
        sound = bank.clip(draw, voice, string)
    else:
        string = draw_string(draw, split)
        sound = _in_turn(bank, draw, voice, string)
    answer = ", ".join(DIGITS[i] for i in string)
    name, content = f"{voice.name}.wav", _recorded(bank, draw, sound, split)
    question = user(_audio(name), wording(draw, STRING, split))
    return Sample([question, assistant(answer.capitalize() + ".")], answer, {name: content})


def silence(bank: Bank, draw: np.random.Generator, split: Split) -> Sample:
    """What is heard: nothing, noise, a beep, music, or a digit; asked for digits where there are none, too."""
    kind = pick(draw, ("silence", "noise", "a beep", "music", "speech", "speech"))
    if kind == "speech":
        word, name, content = _spoken_digit(bank, draw, split)
        question = user(_audio(name), wording(draw, SOUND, split))
        return Sample([question, assistant(f"I hear someone say {word}.")], word, {name: content})
    asked = SOUND if draw.random() < 0.7 else pick(draw, (DIGIT, STRING))
    name = f"{kind.removeprefix('a ')}.wav"
    question = user(_audio(name), wording(draw, asked, split))
    media = {name: wav(no_speech(draw, kind, split), RATE)}
    return Sample([question, assistant(f"I hear {kind}.")], kind.removeprefix("a "), media)


def heard(bank: Bank, draw: np.random.Generator, split: Split) -> Sample:
    """A digit heard before, with nothing, a question of text or another sound in between."""
    word, name, content = _spoken_digit(bank, draw, split)
    media = {f"first-{name}": content}
    told = user(_audio(f"first-{name}"), wording(draw, TELL_SOUND, split))
    between: list = []
    chance = draw.random()
    if chance < 0.35:
        between = pick(draw, (add, spell, count))(draw, split).messages
    elif chance < 0.7:
        other, name, content = _spoken_digit(bank, draw, split)
        media[name] = content
        between = [user(_audio(name), wording(draw, DIGIT, split)), assistant(f"The digit is {other}.")]
    recalled = user(wording(draw, RECALL_SOUND, split)), assistant(f"The first digit was {word}.")
    return Sample([told, assistant(KEPT), *between, *recalled], word, media)


def no_speech(draw: np.random.Generator, kind: str, split: Split) -> np.ndarray:
    """Silence, noise, a beep or music, [samples]; silence is hardly heard, noise well.

    The test's noises have slopes, its beeps pitches and its music keys between those of training. Music of training has
    notes of all pitches, those of the test's beeps too, so that a pitch alone does not tell music from a beep.
    """
    size = int(draw.uniform(0.5, 4) * RATE)
    if kind == "silence":
        return leveled(hiss(draw, size), float(draw.uniform(-90, -60))) * (draw.random() > 0.2)
    if kind == "noise":
        sound = hiss(draw, size, apart(draw, split, 0, 1, SLOPES)) + draw.uniform(0, 1) * hum(draw, size) * (
            draw.random() < 0.3
        )
        return leveled(sound, float(draw.uniform(-30, 0)))
    if kind == "a beep":
        sound = placed(draw, beep(draw, apart(draw, split, 300, 3000, PITCHES)), 0.8)
    else:
        sound = placed(draw, music(draw, apart(draw, split, 65, 1500, KEYS)), 0.8)
    sound = sound / np.abs(sound).max() + float(draw.uniform(0, 0.02)) * hiss(draw, len(sound))
    return leveled(sound, float(draw.uniform(-25, 0)))


def apart(draw: np.random.Generator, split: Split, low: float, high: float, held: tuple[float, float]) -> float:
    """A number of `held` for the test, for training one from low to high outside it."""
    if split == "test":
        return float(draw.uniform(*held))
    value = float(draw.uniform(low, high - (held[1] - held[0])))
    return value if value < held[0] else value + held[1] - held[0]


def say(bank: Bank, draw: np.random.Generator, digit: int, split: Split) -> np.ndarray:
    """A digit of a voice of a split, float32 [samples], without silence around it."""
    clip = bank.clip(draw, bank.voice(draw, split), [digit])
    spoken = other_voice(draw, clip) if split == "train" and draw.random() < 0.7 else clip
    return leveled(spoken, float(draw.uniform(-15, -1)))


def _spoken_digit(bank: Bank, draw: np.random.Generator, split: Split) -> tuple[str, str, bytes]:
    """The word of a digit, and a file of it."""
    voice, i = bank.voice(draw, split), int(draw.integers(10))
    return DIGITS[i], f"{voice.name}.wav", _recorded(bank, draw, bank.clip(draw, voice, [i]), split)


def _in_turn(bank: Bank, draw: np.random.Generator, voice: Voice, string: Sequence[int]) -> np.ndarray:
    """Digits with pauses between them, of one pace and about one loudness."""
    pause = float(draw.uniform(0.02, 0.35))
    parts = []
    for i in string:
        parts.append(bank.clip(draw, voice, [i]) * draw.uniform(0.6, 1))
        parts.append(np.zeros(int(pause * draw.uniform(0.6, 1.4) * RATE)))
    return np.concatenate(parts[:-1])


def _recorded(bank: Bank, draw: np.random.Generator, speech: np.ndarray, split: Split) -> bytes:
    """Speech as it is heard in a split."""

    def crowd() -> np.ndarray:
        return bank.clip(draw, bank.voice(draw, "train"), [int(draw.integers(10))])

    return wav(mild(draw, speech) if split == "test" else varied(draw, speech, crowd), RATE)


def _audio(name: str) -> dict[str, str]:
    return {"type": "audio", "audio": name}
