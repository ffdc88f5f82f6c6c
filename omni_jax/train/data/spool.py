"""Samples in a temporary file, so that a dataset need not fit into memory. The file goes with the process."""

import os
import tempfile
from array import array

from omni_jax.errors import InputError
from omni_jax.files import reason_of


class Spool:
    """Values as bytes, by number. `TMPDIR` says where the file lies."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, value: bytes) -> None:
        """Add a value; InputError where the disk is full."""
        try:
            written = self._file.write(value)
        except OSError as error:
            written, why = 0, reason_of(error)
        else:
            why = "no space is left"
        if written != len(value):
            remedy = "make room, or let TMPDIR name a folder with more"
            raise InputError(f"samples cannot be kept in {tempfile.gettempdir()} ({why}); {remedy}")
        self._ends.append(self._ends[-1] + len(value))

    def __getitem__(self, number: int) -> bytes:
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start)
