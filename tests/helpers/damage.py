"""Damage to converted checkpoints."""

from pathlib import Path


def flip(directory: Path, pattern: bytes, bit: int) -> Path:
    """Flip one bit of the bytes `pattern` where they are in the data of a converted checkpoint; returns the file."""
    for file in sorted((directory / "params").rglob("d/*")):
        data = bytearray(file.read_bytes())
        at = data.find(pattern)
        if at >= 0:
            data[at + bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            return file
    raise AssertionError("the tensor's bytes are nowhere in the data")
