"""What the two speakers say: the model's own answers and what users tell it, word by word, by two synthetic voices.

    rows/*.train.jsonl -> sentences -> words -> speech/<speaker>/<word>.wav, speech/speech.jsonl

Each voice says every word once, by itself, at 24 kHz; a clip lasts a whole number of frames of codes, and a sentence is
its words' clips one after another, with a frame of silence for each comma and colon. So a word always has the same
codes, which a Talker of this size can learn; words that flow into each other have others every time.

`speech.jsonl` holds a line for each sentence and speaker. Every word is said alone, and then the senses give their
answers in turn, so that senses with few different answers give all of them; those whose words stand in any order give
several at a time, because the order is learned from many. The last tenth, mostly digit strings, word lists and scenes,
is held out from training.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, zip_longest
from pathlib import Path
from shutil import which
from string import ascii_lowercase

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from scripts.nano.origin import check_origin
from scripts.nano.rows import made_senses, rows_digest, rows_path
from scripts.nano.sounds import synthesised, wav
from scripts.nano.text import KEPT
from scripts.nano.words import DIGITS, IT_SAYS, NOUNS, NUMBERS

# The voices of the Debian package flite that the speakers have.
VOICES = {"chelsie": "slt", "ethan": "rms"}
# One sentence in so many, the last ones, is kept for the test.
HELD = 10
# Answers that a sense gives at a turn; the others give one.
SEVERAL = {"digits": 10, "add": 2, "count": 2, "scene": 2}
# How often each letter is said in strings of letters, and their length.
ALPHABETS, STRING = 16, 5
# How many training rows must hold a word in their answer for it to be said: invented ones, of which there are
# thousands, are in fewer. The longest sentence, in words and pauses.
FREQUENT, LONGEST = 200, 36
# What the voices' durations are multiplied by, the seconds of silence around a word, and the samples of a frame.
PACE, BEFORE, AFTER = 0.8, 0.02, 0.04
FRAME = SAMPLES_PER_SECOND * 8 // 100
PAUSES = ",:"
# What lists are made of, what stands between their words, and how often each kind is said; the longest, in words.
LISTS = ((DIGITS, ", "), (NUMBERS, ", "), (NOUNS, ", "), (NOUNS, " "), ([*ascii_lowercase], ", "))
LIST_SHARES, LONGEST_LIST = (0.5, 0.15, 0.15, 0.1, 0.1), 5
# One list of so many is one word in quotes, where it has other tokens.
QUOTED_EVERY = 8
# The words of lists.
OF_LISTS = frozenset((*NUMBERS, *NOUNS, *ascii_lowercase, "it", "says"))


def write_speech(directory: Path, count: int, seed: int, workers: int) -> Path:
    """Say the words of sentences of the rows in `directory`, those that are not said yet: the file of the sentences.

    InputError if another list is there.
    """
    path = directory / "speech" / "speech.jsonl"
    rows = rows_digest(directory)
    settings = {"rows": rows, "sentences": count, "seed": seed, "clips": [PACE, BEFORE, AFTER]}
    check_origin(directory, "speech", [path.parent], settings)
    if path.exists():
        return path
    if which("flite") is None:
        raise InputError("flite is missing; install the Debian package flite")
    said = sayable(directory)
    texts = sentences(said, count, seed)
    train = len(texts) - len(texts) // HELD
    known = {word for text in chain(texts, *said.values()) for word in said_words(text)} - {*PAUSES}
    known |= OF_LISTS
    for speaker in VOICES:
        (path.parent / speaker).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda one: _say(path.parent, *one), [(who, word) for who in VOICES for word in sorted(known)]))
    lines = [
        {"speaker": who, "text": text, "split": "train" if i < train else "test"}
        for who in VOICES
        for i, text in enumerate(texts)
    ]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def sentences(said: Mapping[str, list[str]], count: int, seed: int) -> list[str]:
    """Every word alone, strings of letters, then the answers of the senses in turn.

    said: the answers of each sense's training rows, as `sayable` gives them. They are taken in a random order, so that
    frequent ones come first.
    """
    draw = np.random.default_rng(seed)
    turns = zip_longest(*(_turns(draw, texts, SEVERAL.get(sense, 1)) for sense, texts in said.items()))
    words = (word.capitalize() + "." for word in (*NUMBERS, *NOUNS))
    given = chain(*(texts for turn in turns for texts in turn if texts is not None))
    texts = chain([KEPT], words, _letters(draw), given)
    return list(islice(dict.fromkeys(text for text in texts if text), count))


def sayable(directory: Path) -> dict[str, list[str]]:
    """The last answers of each sense's training rows that the speakers say: no long ones, and of known words."""
    said = _said(directory)
    held = Counter(word for text in chain(*said.values()) for word in {*said_words(text)})
    known = {word for word, count in held.items() if count >= FREQUENT} | OF_LISTS | {*PAUSES}
    return {sense: [text for text in texts if _is_sayable(text, known)] for sense, texts in said.items()}


def a_list(draw: np.random.Generator) -> str:
    """A list of digits, of numbers, of nouns or of letters, which a Talker learns to say in order; or a quoted word."""
    if draw.integers(QUOTED_EVERY) == 0:
        return IT_SAYS.format(draw.choice([*NUMBERS, *NOUNS]))
    words, mark = LISTS[int(draw.choice(len(LISTS), p=LIST_SHARES))]
    return mark.join(draw.choice(words, int(draw.integers(2, LONGEST_LIST + 1)))).capitalize() + "."


def training_answers(directory: Path) -> list[str]:
    """The last answer of every training row once, sorted; InputError without rows."""
    return sorted(set(chain(*_said(directory).values())))


def _turns(draw: np.random.Generator, texts: list[str], several: int) -> list[list[str]]:
    """Different texts in a random order, so many at a time."""
    different = list(dict.fromkeys(texts[i] for i in draw.permutation(len(texts))))
    return [different[i : i + several] for i in range(0, len(different), several)]


def _said(directory: Path) -> dict[str, list[str]]:
    """The last answer of every training row, those of each sense by themselves."""
    senses = made_senses(directory, "train")
    if not senses:
        raise InputError(f"{directory}/rows holds no training rows; run the stage data first")
    lines = {sense: rows_path(directory, sense, "train").read_text().splitlines() for sense in senses}
    return {sense: [json.loads(line)["messages"][-1]["content"] for line in each] for sense, each in lines.items()}


def _letters(draw: np.random.Generator) -> Iterator[str]:
    """Strings of letters, in which all are as frequent; words hold some hardly ever."""
    for _ in range(ALPHABETS):
        order = draw.permutation(list(ascii_lowercase)).tolist()
        for begin in range(0, len(order), STRING):
            yield ", ".join(order[begin : begin + STRING]).capitalize() + "."


def said_words(text: str) -> list[str]:
    """The words of a sentence in lower case, and the marks between them at which a speaker pauses."""
    return re.findall(f"[a-z]+|[{PAUSES}]", text.lower())


def _is_sayable(text: str, known: set[str]) -> bool:
    words = said_words(text)
    return 0 < len(words) <= LONGEST and known.issuperset(words)


def read_clips(speech: Path) -> dict[str, dict[str, np.ndarray]]:
    """What each speaker says, int16 [n] for each word and pause, n a multiple of FRAME."""
    import soundfile

    clips = {speaker: dict.fromkeys(PAUSES, np.zeros(FRAME, np.int16)) for speaker in VOICES}
    for speaker, said in clips.items():
        said |= {file.stem: soundfile.read(file, dtype="int16")[0] for file in (speech / speaker).glob("*.wav")}
    return clips


def of_words(text: str, words: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    """What there is of each of a sentence's N words and pauses: N clips `[samples]`, or N blocks of codes `[16, T]`."""
    return [words[word] for word in said_words(text)]


def _say(folder: Path, speaker: str, word: str) -> None:
    """Say a word into `folder`."""
    file = folder / speaker / f"{word}.wav"
    if not file.exists():
        wave = synthesised(word, VOICES[speaker], SAMPLES_PER_SECOND, PACE, BEFORE, AFTER)
        whole = np.pad(wave, (0, -len(wave) % FRAME))
        write_whole(file, wav(whole, SAMPLES_PER_SECOND))
