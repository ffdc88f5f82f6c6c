"""The spoken digits of the test as other recorders and lines give them, and handwritten ones that are all photographed.

The clips are those of rows/digit.test.jsonl, at 16 kHz; each condition changes nothing else. The replies under each are
kept as those to a sense are.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np

from omni_jax.inputs.audio import load_audio
from omni_jax.omni import Messages
from scripts.nano.augment import leveled, mixed
from scripts.nano.evaluation import Evaluator, Results, Row, media_of, questions, results_of, rows_for_test
from scripts.nano.rows import Sample, Sense, samples
from scripts.nano.sounds import wav
from scripts.nano.voices import RATE
from scripts.nano.written import written

# Clips of each condition, and photographs.
CLIPS, PHOTOS = 300, 300
NOISE_DECIBELS, MP3_BITS = 10.0, 32_000
# Of the noise and the photographs.
SEED = 5
PHOTOGRAPHS = "photographs"

Change = Callable[[np.ndarray, int], bytes]


def conditions() -> dict[str, Change]:
    """The file of a clip float32 [samples] under each condition; the second argument is its number."""
    return {
        "8 kHz": lambda sound, _: wav(resampled(sound, 8000), 8000),
        "16 kHz": lambda sound, _: wav(sound, RATE),
        "44.1 kHz": lambda sound, _: wav(resampled(sound, 44_100), 44_100),
        "stereo": lambda sound, _: wav(np.stack([sound, 0.5 * sound], axis=1), RATE),
        "44.1 kHz, stereo": lambda sound, _: wav(np.stack([resampled(sound, 44_100)] * 2, axis=1), 44_100),
        "MP3, 32 kbit/s": lambda sound, _: mp3(sound),
        "noise, 10 dB": noisy,
    }


def evaluate_robustness(evaluator: Evaluator, output: Path) -> dict[str, Results]:
    """The results of every condition, of replies that are kept or new ones."""
    return {
        name: results_of(rows[0]["sense"], rows, evaluator.replies(file_of(name), asked))
        for name, rows, asked in _asked(output, evaluator.limit)
    }


def read_robustness(evaluator: Evaluator, output: Path) -> dict[str, Results]:
    """The results of the conditions of which replies are kept."""
    found: dict[str, Results] = {}
    if not any(evaluator.folder.glob("robust-*.json")):
        return found
    for name, rows, asked in _asked(output, evaluator.limit):
        if (replies := evaluator.kept_replies(file_of(name), asked)) is not None:
            found[name] = results_of(rows[0]["sense"], rows, replies)
    return found


def file_of(condition: str) -> str:
    """The name under which the replies of a condition are kept."""
    return "robust-" + re.sub(r"[^a-z0-9.]+", "-", condition.lower())


def _asked(output: Path, limit: int | None) -> Iterator[tuple[str, Sequence[Row], list[Messages]]]:
    """The name of every condition, with its rows and what they ask."""
    rows = rows_for_test(output, "digit", limit)[:CLIPS]
    clips = [load_audio(output / "rows" / media_of(row)[0]) for row in rows]
    for name, change in conditions().items():
        yield name, rows, [_replaced(one, change(clips[i], i)) for i, one in enumerate(questions(rows, output))]
    sense = Sense("photograph", partial(written, output, photos=1.0), {})
    made = list(islice(samples(sense, "test", SEED), min(PHOTOS, limit or PHOTOS)))
    photographs = [{"sense": "written", "answer": one.answer, "messages": one.messages} for one in made]
    yield PHOTOGRAPHS, photographs, [_shown(sample) for sample in made]


def _shown(sample: Sample) -> Messages:
    """What a sample asks, with its picture in the place of its name."""
    (message,) = sample.messages[:-1]
    parts = [p if p["type"] == "text" else {**p, "image": sample.media[p["image"]]} for p in message["content"]]
    return [{**message, "content": parts}]


def _replaced(messages: Messages, sound: bytes) -> Messages:
    """Messages of one sound with another in its place."""
    (message,) = messages
    parts = [{**p, "audio": sound} if p["type"] == "audio" else p for p in message["content"]]
    return [{**message, "content": parts}]


def resampled(sound: np.ndarray, rate: int) -> np.ndarray:
    """A sound float [samples] at 16 kHz at another rate, [other samples]."""
    from scipy.signal import resample_poly

    return resample_poly(sound, rate, RATE)


def noisy(sound: np.ndarray, number: int) -> bytes:
    """A WAV of a sound [samples] with white noise that is 10 dB below its speech; no louder than before."""
    hiss = np.random.default_rng([SEED, number]).standard_normal(len(sound))
    level = 20 * np.log10(max(float(np.abs(sound).max()), 1e-6))
    return wav(leveled(mixed(sound, hiss, NOISE_DECIBELS), level), RATE)


def mp3(sound: np.ndarray) -> bytes:
    """An MP3 of 32 kbit/s of a sound float [samples] at 16 kHz."""
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono", bit_rate=MP3_BITS)
        frame = av.AudioFrame.from_ndarray(sound.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()
