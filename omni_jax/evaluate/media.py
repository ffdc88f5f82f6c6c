"""Media that rows name: paths relative to the file that names them, in every form, and a digest of their bytes.

Every file is read once before any weight is, so that one that is missing or unreadable is reported at once, and a run
that goes on notices one that has changed.
"""

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from omni_jax.errors import InputError
from omni_jax.inputs.messages import KINDS, read_conversation, with_base
from omni_jax.inputs.source import open_source, reading, scheme_of

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
        messages = with_base([_as_message(message) for message in messages], folder.absolute())
        digests = [self._digest(path, kind) for path, kind in _files(messages)]
        return messages, hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""

    def _digest(self, path: Path, kind: str) -> str:
        if path not in self._digests:
            _check_there(path)
            with reading(path, kind, "cannot be read"), open_source(path, kind) as file:
                if path.stat().st_size > MAX_MEDIA_BYTES:
                    raise InputError(f"{kind} {path}: more than {MAX_MEDIA_BYTES:,} bytes; cut it into parts")
                digest = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            # Not before: an error while reading may be known only now.
            self._digests[path] = digest
        return self._digests[path]


def _files(messages: list[Any]) -> Iterator[tuple[Path, str]]:
    """The files that messages name, and of which kind each is; InputError for what can be no medium."""
    for medium in read_conversation(messages).media:
        frames = medium.kind == "video" and isinstance(medium.source, list)
        for source in medium.source if frames else [medium.source]:
            kind = "image" if frames else medium.kind
            if isinstance(source, str):
                yield Path(source), kind
            elif not isinstance(source, bytes):
                raise InputError(f"{medium.where}: {kind} of type {type(source).__name__}; give a path or base64")


def _check_there(path: Path) -> None:
    """InputError if there is no such file; whatever else is wrong with it shows when it is opened."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist; paths of media are relative to the dataset's file") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            remedy = "write base64 as data:image/png;base64,..."
            raise InputError(f"{str(path)[:80]!r}... is no path ({error.strerror}); {remedy}") from None


def _as_message(message: Any) -> Any:
    """A message with its media as messages hold them; anything else stays as it is."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_as_part(part) if isinstance(part, dict) else part for part in message["content"]]}


def _as_part(part: dict) -> dict:
    """A part whose medium is bytes or a path, where a table has both and OpenAI's form of a sound has an address."""
    form = part.get("type")
    if form in KINDS and isinstance(part.get(form), dict):
        medium = part[form].get("bytes") or part[form].get("path")
        if not medium:
            raise InputError(f"{form!r} holds {sorted(part[form])[:4]}; give a path, or an encoded file as 'bytes'")
        return part | {form: medium}
    sound = part.get("input_audio") if form == "input_audio" else None
    if isinstance(sound, dict) and scheme_of(str(sound.get("data"))) == "file":
        return {"type": "audio", "audio": sound["data"]}
    return part
