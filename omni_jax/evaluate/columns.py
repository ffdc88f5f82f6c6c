"""Which columns of a row are read; a row whose media or words would be lost by a wrong name is refused."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from omni_jax.errors import InputError
from omni_jax.inputs.messages import KINDS

FORMS = ("messages", "prompt", "turns")
_REFERENCES = ("reference", "references")
_MEANT = (*FORMS, *_REFERENCES, *KINDS, "system", "choices")
COLUMNS = {*_MEANT, "answer", "id", "question_id", "category"}
# Names that other formats give to a medium.
_MEDIUM = re.compile(rf"({'|'.join(KINDS)})s?([_-]?(url|path|file)s?)?", re.IGNORECASE)
_NEAR = 0.8  # of difflib's likeness; a letter too many, too few or changed in a word of five, or two swapped


def check_columns(row: Mapping[str, Any]) -> set[str]:
    """The columns of a row that are not read; InputError for one that seems to be misnamed.

    Near misses of a column count only where the row has no such column itself.
    """
    unread = {name for name, value in row.items() if name not in COLUMNS and value not in ("", [], {})}
    taken = {name for group in (FORMS, _REFERENCES) if any(one in row for one in group) for name in group}
    free = [name for name in _MEANT if name not in row and name not in taken]
    for name in sorted(unread):
        medium = _MEDIUM.fullmatch(name)
        if medium is not None and (kind := medium[1].lower()) in free and not _holds(row.get("messages"), kind):
            where = "its part of the messages" if "messages" in row else f"{kind!r}, which may be a list"
            raise InputError(f"the column {name!r} is not read; write {where}")
        # People rarely miss the first letter: "preference" is a word of its own.
        if near := get_close_matches(name.lower(), [one for one in free if one[0] == name[:1].lower()], 1, _NEAR):
            raise InputError(f"the column {name!r} is not read; write {near[0]!r} if that is meant, or rename it")
    return unread


def _holds(messages: Any, kind: str) -> bool:
    """Whether a part of the messages is a medium of a kind, in any form; nothing else is checked."""
    contents = [message.get("content") for message in messages or () if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and kind in str(part.get("type")) for part in parts)
