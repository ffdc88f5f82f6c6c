"""Media that rows name: found relative to the file that names them, whatever the form, and known by their bytes.

Every file is read once before any weight is, so that one that is missing or unreadable is reported at once, and a run
that goes on notices one that has changed.
"""

import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from omni_jax.errors import InputError
from omni_jax.files import user_path
from omni_jax.inputs.messages import KINDS
from omni_jax.inputs.source import open_source, reading, scheme_of

MAX_MEDIA_BYTES = 64_000_000_000  # of one file
_URLS = {f"{kind}_url": kind for kind in KINDS}


class Library:
    """The media of a dataset. Each file is read once, however many rows name it."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def locate(self, messages: list[Any], folder: Path) -> tuple[list[Any], str]:
        """The messages with the paths of their media made absolute, and a digest of what these files hold.

        folder: that of the file with the row. The digest is hexadecimal, "" without files. Raises InputError for a
        medium that is missing or cannot be read.
        """
        digests: list[str] = []

        def found(source: Any, kind: str) -> Any:
            if source is not None and not isinstance(source, str | bytes):
                raise InputError(f"{kind} of type {type(source).__name__}; give a path or base64")
            path = _path(source, folder) if isinstance(source, str) else None
            if path is None:
                return source
            digests.append(self._digest(path, kind))
            return str(path)

        messages = [_with_media(message, found) for message in messages]
        return messages, hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""

    def _digest(self, path: Path, kind: str) -> str:
        if path not in self._digests:
            if path.stat().st_size > MAX_MEDIA_BYTES:
                raise InputError(f"{kind} {path}: more than {MAX_MEDIA_BYTES:,} bytes; cut it into parts")
            with open_source(path, kind) as file, reading(path, kind, "cannot be read"):
                digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            # Not before: an error while reading may be known only now.
            self._digests[path] = digest
        return self._digests[path]


Found = Callable[[Any, str], Any]


def _with_media(message: Any, found: Found) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_part(part, found) for part in message["content"]]}


def _part(part: Any, found: Found) -> Any:
    """A part with its sources replaced by what `found` makes of them; what is no medium stays as it is."""
    form = part.get("type") if isinstance(part, dict) else None
    if form in KINDS:
        key = next((key for key in (form, "path", "url") if part.get(key) is not None), None)
        return {**part, key: _source(part[key], form, found)} if key else part
    if form in _URLS and isinstance(part.get(form), dict):
        return {**part, form: {**part[form], "url": found(part[form].get("url"), _URLS[form])}}
    if form in _URLS:
        return {**part, form: found(part.get(form), _URLS[form])}
    sound = part.get("input_audio") if form == "input_audio" else None
    if isinstance(sound, dict) and scheme_of(str(sound.get("data"))) == "file":
        return {"type": "audio", "audio": found(sound["data"], "audio")}
    return part


def _source(source: Any, kind: str, found: Found) -> Any:
    """One medium, a table's {"bytes", "path"}, or the frames of a video as a list of pictures."""
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, list):
        return [found(frame, "image") for frame in source]
    return found(source, kind)


def _path(source: str, folder: Path) -> Path | None:
    """The file that a source names; None if it is an address instead, or data. InputError if there is none."""
    scheme = scheme_of(source)
    if scheme == "file":
        source = unquote(re.sub(r"(?i)^file:(//(localhost)?(?=/))?", "", source))
    elif scheme or not source:
        return None
    path = folder.absolute() / source
    if source.startswith("~") and not os.path.lexists(path):
        path = user_path(source, "the medium")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character in the name
        raise InputError(f"{path} does not exist; paths of media are relative to the dataset's file") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            remedy = "write base64 as data:image/png;base64,..."
            raise InputError(f"{source[:40]!r}... is no path ({error.strerror}); {remedy}") from None
    return path
