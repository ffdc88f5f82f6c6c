"""What the two speakers say: the model's own answers and what users tell it, spoken by two synthetic voices.

Each sentence is spoken once by each voice, at 24 kHz, with little silence around it. `speech.jsonl` holds a line for
each: speaker, text and file. Sentences whose number ends in 9 are no speaker's training.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from omni_jax.models.code2wav import SAMPLES_PER_SECOND

# The voices of the Debian package flite that the speakers have.
VOICES = {"chelsie": "slt", "ethan": "rms"}
# Every so many-th sentence is kept for the test.
HELD = 10
# Seconds of silence that are left before and after, and the level below which a sample is silence.
BEFORE, AFTER, SILENCE = 0.04, 0.12, 0.01
LEVEL = 0.08


def write_speech(directory: Path, sentences: int, seed: int, workers: int) -> Path:
    """Speak sentences of the rows in `directory`, those that are not spoken yet: the file that lists them."""
    path = directory / "speech" / "speech.jsonl"
    if path.exists():
        return path
    if shutil.which("flite") is None:
        raise InputError("flite is missing; install the Debian package flite")
    texts = _texts(directory, sentences, seed)
    asked = [(speaker, i, text) for speaker in VOICES for i, text in enumerate(texts)]
    for speaker in VOICES:
        (path.parent / speaker).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        lines = list(pool.map(lambda one: _spoken(path.parent, *one), asked))
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def _texts(directory: Path, count: int, seed: int) -> list[str]:
    """Different answers of the training rows, in a random order."""
    said = training_answers(directory)
    order = np.random.default_rng(seed).permutation(len(said))[:count]
    return [said[i] for i in order]


def training_answers(directory: Path) -> list[str]:
    """Every answer of the training rows once, sorted; InputError without rows."""
    said = sorted({text for file in sorted(directory.glob("rows/*.train.jsonl")) for text in _answers(file)})
    if not said:
        raise InputError(f"{directory}/rows holds no training rows; run the stage data first")
    return said


def _answers(file: Path) -> Iterator[str]:
    for line in file.read_text().splitlines():
        yield from (m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant")


def _spoken(folder: Path, speaker: str, index: int, text: str) -> dict[str, str]:
    """Speak one sentence into `folder`: its line."""
    import soundfile
    from scipy.signal import resample_poly

    file = folder / speaker / f"{index:05d}.wav"
    if not file.exists():
        raw = file.with_suffix(".raw.wav")
        subprocess.run(["flite", "-voice", VOICES[speaker], "-t", text, "-o", str(raw)], check=True)
        wave, rate = soundfile.read(raw, dtype="float32")
        raw.unlink()
        wave = trimmed(resample_poly(wave, SAMPLES_PER_SECOND, rate), SAMPLES_PER_SECOND)
        part = file.with_suffix(".partial.wav")
        soundfile.write(part, wave, SAMPLES_PER_SECOND, subtype="PCM_16")
        part.rename(file)
    split = "test" if index % HELD == HELD - 1 else "train"
    return {"speaker": speaker, "text": text, "audio": f"{speaker}/{file.name}", "split": split}


def trimmed(wave: np.ndarray, rate: int) -> np.ndarray:
    """A wave float32 [n] at one level, with little silence around it."""
    loud = np.flatnonzero(np.abs(wave) > SILENCE * np.abs(wave).max(initial=1e-9))
    if not loud.size:
        return wave
    wave = wave[max(0, loud[0] - round(BEFORE * rate)) : loud[-1] + round(AFTER * rate)]
    wave = wave * LEVEL / np.sqrt(np.mean(wave**2))
    return (wave * min(1.0, 0.95 / np.abs(wave).max())).astype(np.float32)
