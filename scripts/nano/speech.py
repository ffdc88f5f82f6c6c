"""What the two speakers say: the model's own answers and what users tell it, spoken by two synthetic voices.

Each sentence is spoken once by each voice, at 24 kHz, with little silence around it. `speech.jsonl` holds a line for
each: speaker, text and file, which is named by voice and text. Every word is said alone, and then the senses give their
answers in turn, so that senses with few different answers give all of them; those whose words stand in any order give
several at a time, because the order is learned from many. The last tenth, mostly digit strings, word lists and scenes,
is held out from training.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain, islice, zip_longest
from pathlib import Path
from shutil import which
from string import ascii_lowercase

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from scripts.nano.origin import check_origin, rows_digest
from scripts.nano.rows import Split, made_senses, rows_path
from scripts.nano.sounds import synthesised, wav
from scripts.nano.text import KEPT
from scripts.nano.words import NOUNS, NUMBERS

# The voices of the Debian package flite that the speakers have.
VOICES = {"chelsie": "slt", "ethan": "rms"}
# One sentence in so many, the last ones, is kept for the test.
HELD = 10
# Answers that a sense gives at a turn; the others give one.
SEVERAL = {"digits": 10, "add": 2, "count": 2, "scene": 2}
# How often each letter is said in strings of letters, and their length.
ALPHABETS, STRING = 16, 5


def write_speech(directory: Path, count: int, seed: int, workers: int) -> Path:
    """Speak sentences of the rows in `directory`, those that are not spoken yet: the file that lists them.

    InputError if another list is there.
    """
    path = directory / "speech" / "speech.jsonl"
    rows = rows_digest(directory, made_senses(directory, "train"))
    check_origin(directory, "speech", [path], {"rows": rows, "sentences": count, "seed": seed})
    if path.exists():
        return path
    if which("flite") is None:
        raise InputError("flite is missing; install the Debian package flite")
    texts = sentences(directory, count, seed)
    train = len(texts) - len(texts) // HELD
    asked = [(speaker, text, "train" if i < train else "test") for speaker in VOICES for i, text in enumerate(texts)]
    for speaker in VOICES:
        (path.parent / speaker).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        lines = list(pool.map(lambda one: _spoken(path.parent, *one), asked))
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def sentences(directory: Path, count: int, seed: int) -> list[str]:
    """Every word alone, strings of letters, then the answers of the training rows, each sense's in turn.

    A sense's rows are taken in a random order, so that its frequent answers come first.
    """
    draw = np.random.default_rng(seed)
    turns = zip_longest(*(_turns(draw, texts, SEVERAL.get(sense, 1)) for sense, texts in _said(directory).items()))
    words = (word.capitalize() + "." for word in (*NUMBERS, *NOUNS))
    given = chain(*(texts for turn in turns for texts in turn if texts is not None))
    texts = chain([KEPT], words, _letters(draw), given)
    return list(islice(dict.fromkeys(text for text in texts if text), count))


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


def clip_name(voice: str, text: str) -> str:
    """The file of a sentence in a voice: the same for the same sentence, however many there are."""
    return sha256(f"{voice}: {text}".encode()).hexdigest()[:16] + ".wav"


def _spoken(folder: Path, speaker: str, text: str, split: Split) -> dict[str, str]:
    """Speak one sentence into `folder`: its line."""
    file = folder / speaker / clip_name(VOICES[speaker], text)
    if not file.exists():
        write_whole(file, wav(synthesised(text, VOICES[speaker], SAMPLES_PER_SECOND), SAMPLES_PER_SECOND))
    return {"speaker": speaker, "text": text, "audio": f"{speaker}/{file.name}", "split": split}
