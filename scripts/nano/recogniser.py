"""A recogniser that had no part in training: PocketSphinx with its own English sounds, told which sentences there are.

Its language model is made of the answers of the training rows, each once, so it knows the words and their usual order,
and hears which of them were said. With a language model of all of English it mistakes a fifth of the words in the
synthesiser's own recordings of such sentences, and so does Moonshine-tiny (16 to 20 %); this one mistakes 2 %. That it
guesses right without hearing is measured where it is used.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np

from omni_jax.errors import InputError
from omni_jax.evaluate.metrics import spoken_form

# From a sound float32 [samples] and its rate to words.
Transcribe = Callable[[np.ndarray, int], str]

RATE = 16_000
# Silence that the recogniser gets before and after, and what its language model leaves for orders that it never saw.
BEFORE, AFTER, DISCOUNT = 0.2, 0.3, 0.1
RECOGNISER = "PocketSphinx"
# All that what is heard depends on but the sentences.
SETTINGS = (RECOGNISER, BEFORE, AFTER, DISCOUNT)


def pocketsphinx() -> tuple[ModuleType, ModuleType]:
    """The package and its module of language models; InputError if it is not installed."""
    try:
        return import_module("pocketsphinx"), import_module("pocketsphinx.lm")
    except ImportError as error:
        raise InputError(
            "speech is judged by PocketSphinx, which is missing; pip install 'pocketsphinx>=5,<6'"
        ) from error


def recogniser(sentences: Sequence[str]) -> Transcribe:
    """A function from a sound float32 [samples] and its rate to words; InputError if PocketSphinx is not installed."""
    sphinx, language = pocketsphinx()
    said = sorted({spoken_form(sentence) for sentence in sentences} - {""})
    model = language.ArpaBoLM(text="\n".join(f"<s> {one} </s>" for one in said), discount_mass=DISCOUNT)
    model.compute()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sentences.lm"
        model.write_file(str(path))
        decoder = sphinx.Decoder(samprate=RATE, loglevel="FATAL", lm=str(path))

    def transcribe(sound: np.ndarray, rate: int) -> str:
        decoder.start_utt()
        decoder.process_raw(_samples(sound, rate).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        # A word with a number in brackets is another way to speak it.
        return re.sub(r"\(\d+\)", "", found.hypstr) if found else ""

    return transcribe


def _samples(sound: np.ndarray, rate: int) -> np.ndarray:
    """A sound at 16 kHz as int16, with silence around it."""
    from scipy.signal import resample_poly

    sound = np.pad(resample_poly(sound, RATE, rate), (int(BEFORE * RATE), int(AFTER * RATE)))
    return (np.clip(sound, -1, 1) * 32767).astype(np.int16)
