"""`omni-jax train check-codes`: codes, or sound through an encoder, decoded by the model's own vocoder to a sound file.

What is heard is what training on these codes would teach the model to say.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tyro.conf import OmitArgPrefixes

from omni_jax.errors import InputError
from omni_jax.flags import DeviceFlags
from omni_jax.loading import load_lazily
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.rows.files import rows_of
from omni_jax.rows.row import plain_row
from omni_jax.sound import check_sound_file, write_sound
from omni_jax.train.codes import Codebooks, Layout, codes_of_row, encode_sound, load_encoder, read_codes
from omni_jax.weights.model import model_config


@dataclass(frozen=True)
class CheckCodes:
    """Listen to codes before the Talker is trained on them."""

    model: Path
    """Model id, Hugging Face directory, converted checkpoint (python -m convert SRC DST), or nano."""
    output: Path
    """The .wav or .flac file to write."""
    codes: Path | None = None
    """A .npy file of codes, [Q, F] or [F, Q], or a .jsonl file of training data."""
    row: int = 1
    """Of training data, the line to decode."""
    speech: Path | None = None
    """A sound file to encode, in place of codes."""
    encoder: str | None = None
    """module:function that makes codes of samples float32 [n] and their rate."""
    layout: Layout = "auto"
    """The axes of codes: codebooks first (QF), frames first (FQ), or by their shape."""
    devices: OmitArgPrefixes[DeviceFlags] = field(default_factory=DeviceFlags)


def check_codes(command: CheckCodes) -> None:
    """Write the sound file, and say on stderr how long it is; InputError before weights are read for what cannot be."""
    output = check_sound_file(command.output)
    codes = codes_of(command)
    devices = command.devices
    omni = load_lazily(
        command.model, mesh=devices.mesh, dtype=devices.dtype, quantize=devices.quantize, parts=("code2wav",)
    )
    wave = omni.vocode(codes)
    write_sound(output, wave)
    seconds = wave.size / SAMPLES_PER_SECOND
    print(
        f"{output}: {codes.shape[1]} frames of {codes.shape[0]} codes, {seconds:.2f} s; listen to it", file=sys.stderr
    )


def codes_of(command: CheckCodes) -> np.ndarray:
    """The codes int32 [Q, F] that are meant."""
    books = Codebooks.of(model_config(command.model), command.layout)
    encoder = None if command.encoder is None else load_encoder(command.encoder)
    if (command.codes is None) == (command.speech is None):
        raise InputError("give either --codes or --speech with --encoder")
    if command.speech is not None:
        if encoder is None:
            raise InputError("--speech needs an encoder; name one with --encoder module:function")
        return encode_sound(command.speech, Path(), encoder, books)
    assert command.codes is not None
    if command.codes.suffix == ".npy":
        return read_codes(command.codes, Path(), books)
    for where, folder, row in rows_of([command.codes]):
        if where == f"{command.codes.name}:{command.row}":
            try:
                return codes_of_row(plain_row(row), folder, encoder, books)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
    raise InputError(f"{command.codes} has no row in line {command.row}; choose another with --row")
