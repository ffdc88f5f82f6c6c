"""Speech to a sound file: the path is checked before the work begins, and the file is complete when it appears.

WAV holds the samples as 16-bit integers, FLAC the same integers compressed without loss. soundfile writes both.
"""

import io
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import reason_of, user_path

FORMATS = {".wav": "WAV", ".flac": "FLAC"}
MAX_RATE = 655_350  # samples per second, the largest rate that FLAC can state


def check_sound_file(path: str | Path) -> Path:
    """The path, with ~ expanded, after a trial of writing there; InputError if no sound file can be written to it."""
    path = user_path(path, "the sound file")
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: speech is written as {' or '.join(FORMATS)}; choose one of these endings")
    try:
        if path.is_dir():
            raise InputError(f"{path} is a directory; name a file")
        if not path.parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; make it, or choose another")
        with suppress(FileNotFoundError):
            path.lstat()  # for a name that is too long
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise InputError(
            f"{path}: no such file can be made ({reason_of(error)}); choose another name or folder"
        ) from None
    return path


def write_sound(path: str | Path, samples: np.ndarray | None, samples_per_second: int = 24_000) -> None:
    """Write sound to a WAV or FLAC file, which appears only when it is complete.

    Args:
        path: the file; its ending, .wav or .flac, chooses the format.
        samples: floats [n] in [-1, 1], such as `reply.audio`, which is None only for a reply without speech.
        samples_per_second: their rate; 24,000 for speech of this model.

    Raises InputError for samples (or None) or a path that cannot be written.
    """
    import soundfile

    path, samples = check_sound_file(path), np.asarray(samples)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise InputError(
            f"samples are {samples.dtype}{list(samples.shape)}; give floats [n], such as `reply.audio` of a reply that "
            "was made with speech=True"
        )
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: samples that are NaN or infinite cannot be written; repair or cut them")
    rate = samples_per_second
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or not 1 <= rate <= MAX_RATE:
        raise InputError(f"{path}: {str(rate)[:40]} samples per second; give a whole number from 1 to {MAX_RATE}")
    # Encoded in memory first, because libsndfile reports no error for a full disk.
    data, partial = io.BytesIO(), _partial(path)
    kind = FORMATS[path.suffix.lower()]
    try:
        soundfile.write(data, samples.astype(np.float32), int(rate), subtype="PCM_16", format=kind)
        partial.write_bytes(data.getbuffer())
        os.replace(partial, path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise InputError(f"{path}: could not be written ({reason_of(error)}); make room, or choose another") from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """The unfinished file: in the same folder, under a name that is short however long the final one is."""
    return path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.partial")
