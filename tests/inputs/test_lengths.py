"""Stated lengths: placeholders are read to the end of the file, every other length is believed."""

import io
import struct

import numpy as np
import pytest
import soundfile

from omni_jax.errors import InputError
from omni_jax.inputs.audio import load_audio
from omni_jax.inputs.lengths import MAX_CHUNKS, is_placeholder

RATE = 16_000
# Of each format: where its header states the length of the sound, bytes of the field, their order, and what that counts
# besides the samples.
FIELDS = {
    "WAV": (b"data", 4, 4, "little", 0),
    "RF64": (b"ds64", 16, 8, "little", 0),
    "AIFF": (b"SSND", 4, 4, "big", 8),
    "AU": (b".snd", 8, 4, "big", 0),
    "W64": (b"data", 16, 8, "little", 24),
    "CAF": (b"data", 4, 8, "big", 4),
}
PLACEHOLDERS = (0, 2_000_000_000, 0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0xFFFFFFFF, 0xFFFFFFFF - 36)


def stating(kind: str, length: int, keep: int | None = None) -> bytes:
    """A second of sound in a file whose header states `length` bytes of it."""
    name, offset, width, order, _ = FIELDS[kind]
    data = io.BytesIO()
    soundfile.write(data, np.random.default_rng(0).normal(0, 0.1, RATE), RATE, format=kind, subtype="PCM_16")
    file = bytearray(data.getvalue())
    at = file.index(name) + offset
    file[at : at + width] = length.to_bytes(width, order)  # type: ignore[arg-type]
    if kind in ("WAV", "AIFF") and not length:
        file[4:8] = bytes(4)  # the whole file's length, which its writer does not know either
    return bytes(file[:keep])


@pytest.mark.parametrize("length", [*PLACEHOLDERS, 2**63 - 1, 2**64 - 1], ids=hex)
@pytest.mark.parametrize("kind", FIELDS)
def test_a_placeholder_is_read_to_the_end_of_the_file(kind, length):
    _, _, width, _, counted = FIELDS[kind]
    if length >= 1 << 8 * width:
        length = (1 << 8 * width) - 1
    whole = load_audio(stating(kind, 2 * RATE + counted))
    assert whole.size == RATE
    np.testing.assert_array_equal(load_audio(stating(kind, length)), whole)


@pytest.mark.parametrize("kind", FIELDS)
def test_a_file_shorter_than_a_plausible_length_is_cut_short(kind):
    counted = FIELDS[kind][-1]
    for length, keep in ((2 * RATE + counted + 2, None), (1_234_567_890, None), (2 * RATE + counted, -2)):
        with pytest.raises(InputError, match="cut short, 3.* of .* bytes of sound are there"):
            load_audio(stating(kind, length, keep))


@pytest.mark.parametrize(
    "name, samples",
    [
        ("wav_size_0.wav", 16_000),
        ("wav_size_2e9.wav", 16_000),
        ("wav_size_7fffffff.wav", 16_000),
        ("espeak_stdout.wav", 10_212),  # 14,073 at 22,050 Hz
    ],
)
def test_sound_that_was_written_to_a_pipe_is_read(data_dir, name, samples):
    assert load_audio(data_dir / name).size == samples
    assert load_audio((data_dir / name).read_bytes()).size == samples


@pytest.mark.parametrize("length", [1, 63, 32_000, 10**9 - 65, 10**9 + 65, 1_500_000_000, 2**29, 2**31 - 2**16 - 1])
def test_other_lengths_are_believed(length):
    assert not is_placeholder(length)


@pytest.mark.parametrize("length", [0, 10**9, 2 * 10**9 + 8, 2**30, 2**31 - 1, 2**31 + 36, 2**32 - 37, 2**64 - 1])
def test_numbers_that_only_a_field_explains_are_placeholders(length):
    assert is_placeholder(length)


def test_an_empty_recording_whose_header_was_completed_is_empty():
    empty = stating("WAV", 0)[:44]
    note = b"LIST" + struct.pack("<I", 1000) + bytes(1000)
    finished = empty[:4] + struct.pack("<I", 36 + len(note)) + empty[8:] + note
    with pytest.raises(InputError, match="holds no samples"):
        load_audio(finished)


@pytest.mark.parametrize("chunks", [1, MAX_CHUNKS // 2])
def test_chunks_before_the_sound_are_passed_over(chunks):
    file = stating("WAV", 0x7FFFFFFF)
    assert load_audio(file[:36] + b"note\3\0\0\0abc\0" * chunks + file[36:]).size == RATE


def test_a_header_without_end_is_given_up():
    file = stating("WAV", 2 * RATE)
    with pytest.raises(InputError, match="more than 1000 chunks"):
        load_audio(file[:36] + b"note\0\0\0\0" * 200_000)
