"""Media of an evaluation's rows: found beside the dataset, read once, and known by a digest of their bytes.

Every file is read once before any weight is, so that one that is missing or unreadable is reported at once, and a run
that goes on notices one that has changed.
"""

import hashlib
from pathlib import Path
from typing import Any, cast

from omni_jax.errors import InputError
from omni_jax.inputs.messages import read_conversation
from omni_jax.inputs.source import open_source, reading
from omni_jax.rows.media import check_there, files_of, located

MAX_MEDIA_BYTES = 64_000_000_000  # of one file


class Library:
    """The media of a dataset. Each file is read once, however many rows name it."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def locate(self, messages: list[Any], folder: Path) -> tuple[list[Any], str]:
        """The messages, checked, with the paths of their media made absolute, and a digest of what these files hold.

        folder: that of the file with the row. The digest is hexadecimal, "" without files. Raises InputError for
        messages that cannot be used, and for a medium that is missing or cannot be read.
        """
        messages = located(messages, folder)
        digests = [self._digest(path, kind) for path, kind in files_of(read_conversation(messages).media)]
        return messages, hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""

    def _digest(self, path: Path, kind: str) -> str:
        if path not in self._digests:
            check_there(path)
            with reading(path, kind, "cannot be read"), open_source(path, kind) as file:
                if path.stat().st_size > MAX_MEDIA_BYTES:
                    raise InputError(f"{kind} {path}: more than {MAX_MEDIA_BYTES:,} bytes; cut it into parts")
                digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            # Not before: an error while reading may be known only now.
            self._digests[path] = digest
        return self._digests[path]
