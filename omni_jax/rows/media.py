"""Media that rows name: paths relative to the file that names them, in every form.

A table may hold a medium itself, as {"bytes": ..., "path": ...}, and OpenAI's form of a sound may hold an address.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.inputs.messages import KINDS, Media, with_base
from omni_jax.inputs.source import scheme_of


def located(messages: list[Any], folder: Path) -> list[Any]:
    """The messages with the paths of their media made absolute; `folder` is that of the file with the row.

    Messages that cannot be used stay as they are; `read_conversation` refuses them. InputError for a medium without a
    source.
    """
    return with_base([_as_message(message) for message in messages], folder.absolute())


def files_of(media: list[Media]) -> Iterator[tuple[Path, str]]:
    """The files of media that rows name, and of which kind each is; InputError for what can be no medium."""
    for medium in media:
        frames = medium.kind == "video" and isinstance(medium.source, list)
        for source in medium.source if frames else [medium.source]:
            kind = "image" if frames else medium.kind
            if isinstance(source, str):
                yield Path(source), kind
            elif not isinstance(source, bytes):
                raise InputError(f"{medium.where}: {kind} of type {type(source).__name__}; give a path or base64")


def check_there(path: Path) -> None:
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
