"""Sounds as files, programs that write them, and sentences as the synthesiser flite says them."""

import subprocess
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from omni_jax.errors import InputError

# Seconds of silence that are left before and after, and the level below which a sample is silence.
BEFORE, AFTER, SILENCE = 0.04, 0.12, 0.01
LEVEL = 0.08


def wav(sound: np.ndarray, rate: int) -> bytes:
    """A WAV file of 16 bits of a sound float [samples] or [samples, channels], which is clipped at 1."""
    import soundfile

    file = BytesIO()
    soundfile.write(file, sound, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def run_synthesiser(command: Sequence[str], files: Sequence[Path]) -> None:
    """Run a program of the Debian package of its name, which writes `files`.

    InputError if it is missing, fails or leaves one unwritten, which flite does without failing.
    """
    program = command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(f"{program} is missing; install the Debian package {program}") from error
    unwritten = [file for file in files if not file.is_file()]
    if done.returncode or unwritten:
        why = done.stderr.strip() or (f"{unwritten[0]} is not there" if unwritten else f"status {done.returncode}")
        raise InputError(
            f"{program} failed: {why}; see that the disk has room, or install the Debian package {program} again"
        )


def synthesised(
    text: str, voice: str, rate: int, pace: float = 1.0, before: float = BEFORE, after: float = AFTER
) -> np.ndarray:
    """A sentence by a voice of flite, at one level with little silence around it: float32 [samples] at `rate`.

    pace: flite's duration_stretch, which replaces the voice's own. before, after: seconds of silence that are left.
    InputError if flite is missing or fails.
    """
    import soundfile
    from scipy.signal import resample_poly

    with TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={pace}", "-t", text, "-o", str(path)]
        run_synthesiser(command, [path])
        wave, own_rate = soundfile.read(path, dtype="float32")
    return trimmed(resample_poly(wave, rate, own_rate), rate, before, after)


def trimmed(wave: np.ndarray, rate: int, before: float = BEFORE, after: float = AFTER) -> np.ndarray:
    """A wave float32 [n] at one level, with so many seconds of silence around it."""
    loud = np.flatnonzero(np.abs(wave) > SILENCE * np.abs(wave).max(initial=1e-9))
    if not loud.size:
        return wave
    wave = wave[max(0, loud[0] - round(before * rate)) : loud[-1] + round(after * rate)]
    wave = wave * LEVEL / np.sqrt(np.mean(wave**2))
    return (wave * min(1.0, 0.95 / np.abs(wave).max())).astype(np.float32)
