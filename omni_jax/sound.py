"""Speech to a sound file: checked before the work begins, complete when it appears.

WAV holds the samples as 16-bit integers, FLAC the same without loss and smaller. soundfile writes both.
"""

import os
from pathlib import Path

import numpy as np

from omni_jax.errors import InputError

FORMATS = {".wav": "WAV", ".flac": "FLAC"}


def check_sound_file(path: str | Path) -> Path:
    """`path` if speech can be written there; InputError for another kind of file or a folder that cannot be used."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: speech is written as {' or '.join(FORMATS)}; choose one of these endings")
    if path.is_dir():
        raise InputError(f"{path} is a directory; name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: its folder does not exist or cannot be written to")
    return path


def write_sound(path: str | Path, samples: np.ndarray, samples_per_second: int = 24_000) -> None:
    """Write float32 samples [n] in [-1, 1]; whoever sees the file sees all of it. InputError if that fails."""
    import soundfile

    path, samples = check_sound_file(path), np.asarray(samples)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise InputError(
            f"samples are {samples.dtype}{list(samples.shape)}; give floats [n], such as `reply.audio` of a reply that "
            "was made with speech=True"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        soundfile.write(partial, samples, samples_per_second, subtype="PCM_16", format=FORMATS[path.suffix.lower()])
        os.replace(partial, path)
    except (OSError, soundfile.LibsndfileError) as error:
        raise InputError(f"{path}: could not be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
