"""The spoken digits of the test as other recorders and lines give them, and handwritten ones that are all photographed.

The clips are those of rows/digit.test.jsonl, at 16 kHz; each condition changes nothing else. evaluation/robust.json
holds the counts of each condition.
"""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np

from omni_jax.inputs.audio import load_audio
from omni_jax.omni import Messages
from scripts.nano.augment import leveled, mixed
from scripts.nano.evaluation import Asked, Results, media_of, questions, rows_for_test
from scripts.nano.judging import is_right
from scripts.nano.rows import Sample, Sense, samples
from scripts.nano.voices import RATE
from scripts.nano.written import written

# Clips of each condition, and photographs.
CLIPS, PHOTOS = 300, 300
NOISE_DECIBELS, MP3_BITS = 10.0, 32_000
# Of the noise and the photographs.
SEED = 5

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


def evaluate_robustness(asked: Asked, output: Path) -> Results:
    """The counts of every condition, those that are kept or new ones."""
    of = repr((CLIPS, PHOTOS, SEED))
    if held := asked.kept("robust", of):
        return held
    rows = rows_for_test(output, "digit", asked.limit)[:CLIPS]
    clips = [load_audio(output / "rows" / media_of(row)[0]) for row in rows]
    found = {}
    for name, change in conditions().items():
        heard = [_replaced(one, change(clips[i], i)) for i, one in enumerate(questions(rows, output))]
        right = [is_right(row, reply) for row, reply in zip(rows, asked.answers(heard), strict=True)]
        found[name] = {"samples": len(rows), "right": sum(right)}
    found["photographs"] = _photographs(asked, output)
    return asked.keep("robust", of, {"conditions": found})


def _photographs(asked: Asked, output: Path) -> dict[str, int]:
    sense = Sense("photograph", partial(written, output, photos=1.0), {})
    made = list(islice(samples(sense, "test", SEED), min(PHOTOS, asked.limit or PHOTOS)))
    replies = asked.answers([_shown(sample) for sample in made])
    rows = [{"sense": "written", "answer": one.answer, "accepted": (), "messages": one.messages} for one in made]
    return {"samples": len(made), "right": sum(map(is_right, rows, replies))}


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

    shared = int(np.gcd(rate, RATE))
    return resample_poly(sound, rate // shared, RATE // shared)


def noisy(sound: np.ndarray, number: int) -> bytes:
    """A WAV of a sound with white noise that is 10 dB below its speech; no louder than before."""
    hiss = np.random.default_rng([SEED, number]).standard_normal(len(sound))
    level = 20 * np.log10(max(float(np.abs(sound).max()), 1e-6))
    return wav(leveled(mixed(sound, hiss, NOISE_DECIBELS), level), RATE)


def wav(sound: np.ndarray, rate: int) -> bytes:
    """A WAV of 16 bits of a sound [samples] or [samples, channels]."""
    import soundfile

    file = BytesIO()
    soundfile.write(file, np.clip(sound, -1, 1), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


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
