"""Codes of speech from files, rows of data, or sound that an encoder turns into them; all are checked here.

    .npy [Q, F] or [F, Q] | a list of lists | sound -> encoder -> checked codes int32 [Q, F]

The model's vocoder decodes them; what encodes them is not published. Public reports say that they are the first 16
codebooks of the Mimi codec; Qwen does not say so. `codes_mimi.encode` makes those, and `omni-jax train check-codes`
decodes codes to a sound file: listen to it before you train on codes of any origin.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.files import reason_of
from omni_jax.inputs.audio import check_samples, read_file
from omni_jax.inputs.values import shown

MIMI = "omni_jax.train.codes_mimi:encode"
Layout = Literal["auto", "QF", "FQ"]
# Samples float32 [n] and their rate per second -> codes int [Q, F].
Encoder = Callable[[np.ndarray, int], Any]
# Frames of the longest speech that is read: a day.
MAX_FRAMES = 1_200_000


@dataclass(frozen=True)
class Codebooks:
    """The model's codebooks: Q of them, each of `size` codes; layout: how arrays are given, "auto" by their shape."""

    count: int
    size: int
    layout: Layout = "auto"

    @classmethod
    def of(cls, config: OmniConfig, layout: Layout = "auto") -> "Codebooks":
        """Those of a model; InputError for one that cannot speak."""
        if config.talker is None:
            raise InputError("this checkpoint has no talker, so that no speech can be trained; name the whole model")
        size = config.talker.code_predictor.vocab_size
        size = size if config.code2wav is None else min(size, config.code2wav.codebook_size)
        return cls(config.talker.num_code_groups, size, layout)

    def check(self, codes: Any) -> np.ndarray:
        """Codes as int32 [Q, F]; InputError, which says what is wrong, unless they are codes of this model."""
        codes = self._laid(_array(codes))
        if not codes.shape[1]:
            raise InputError("codes hold no frame; leave the row out")
        if codes.shape[1] > MAX_FRAMES:
            raise InputError(f"codes hold {codes.shape[1]:,} frames; at most {MAX_FRAMES:,} are read, cut them")
        wrong = (codes < 0) | (codes >= self.size)
        if wrong.any():
            q, frame = (int(i) for i in np.argwhere(wrong)[0])
            raise InputError(
                f"codebook {q} of frame {frame} holds {codes[q, frame]}, not one of the model's 0 to {self.size - 1}; "
                "leave out frames that are padding or hold special ids"
            )
        return codes.astype(np.int32)

    def _laid(self, codes: np.ndarray) -> np.ndarray:
        """Codes [Q, F] or [F, Q] as [Q, F]."""
        Q, shape = self.count, list(codes.shape)
        if codes.ndim != 2 or Q not in shape:
            raise InputError(f"codes have shape {shape}; give [Q, F] or [F, Q] with the model's Q = {Q} codebooks")
        if self.layout == "auto" and shape == [Q, Q]:
            raise InputError(f"codes of shape {shape} can be read in two ways; state --layout QF or FQ")
        by_frames = self.layout == "FQ" or self.layout == "auto" and shape[0] != Q
        if shape[1 if by_frames else 0] != Q:
            raise InputError(f"codes have shape {shape}, but --layout {self.layout} has Q = {Q} on the other axis")
        return codes.T if by_frames else codes


def _array(codes: Any) -> np.ndarray:
    try:
        codes = np.asarray(codes)
    except ValueError as error:
        raise InputError("codes are not an array: give every codebook as many frames") from error
    if codes.dtype.kind not in "iu" and codes.size:
        raise InputError(f"codes are of type {codes.dtype}; give whole numbers")
    return codes


def read_codes(source: Any, folder: Path, books: Codebooks) -> np.ndarray:
    """Codes int32 [Q, F] of a .npy file (a path relative to `folder`) or of a list of lists; InputError for others."""
    if isinstance(source, list):
        return books.check(source)
    if not isinstance(source, str | Path):
        raise InputError(f"codes are of type {type(source).__name__}; give a list of lists, or a path of a .npy file")
    path = folder / Path(source).expanduser()
    if path.suffix != ".npy":
        raise InputError(f"{path}: codes are read from .npy files; write them with numpy.save")
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; paths of codes are relative to the file that names them") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}); write it with numpy.save") from error
    try:
        return books.check(codes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_encoder(name: str) -> Encoder:
    """The function that "module:function" names; InputError if there is none."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise InputError(f"the encoder is {shown(name)}; give module:function, such as {MIMI}")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise InputError(
            f"the encoder {name} cannot be imported ({reason_of(error)}); is its module installed?"
        ) from error
    if not callable(found):
        raise InputError(f"the module {module} has no function {function!r}; name the one that encodes sound")
    return found


def encode_sound(source: Any, folder: Path, encoder: Encoder, books: Codebooks) -> np.ndarray:
    """Codes int32 [Q, F] that an encoder makes of a sound file, whose path is relative to `folder`.

    InputError for sound that cannot be read, and for an encoder that fails or gives no codes of this model.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"'speech' is of type {type(source).__name__}; give the path of a sound file")
    path = folder / Path(source).expanduser()
    samples, rate = read_file(str(path))
    check_samples(str(path), samples)
    try:
        codes = encoder(samples, rate)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: the encoder failed: {reason_of(error)} ({type(error).__name__})") from error
    try:
        return books.check(codes)
    except InputError as error:
        raise InputError(f"{path}: of the encoder's result, {error}") from error


def codes_of_row(row: dict[str, Any], folder: Path, encoder: Encoder | None, books: Codebooks) -> np.ndarray:
    """Codes int32 [Q, F] of a row of data, which has either `codes` or `speech`; InputError for others."""
    given = [name for name in ("codes", "speech") if name in row]
    if len(given) != 1:
        raise InputError(f"the row has {' and '.join(given) or 'neither codes nor speech'}; give one of the two")
    if given == ["codes"]:
        return read_codes(row["codes"], folder, books)
    if encoder is None:
        raise InputError(f"'speech' needs an encoder; name one with --encoder, such as {MIMI}")
    return encode_sound(row["speech"], folder, encoder, books)
