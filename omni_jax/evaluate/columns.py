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
        if medium is not None and (kind := medium[1].lower()) in free:
            where = "its part of the messages" if "messages" in row else f"{kind!r}, which may be a list"
            raise InputError(f"the column {name!r} is not read; write {where}")
        if near := get_close_matches(name.lower(), free, n=1, cutoff=_NEAR):
            raise InputError(f"the column {name!r} is not read; write {near[0]!r} if that is meant, or rename it")
    return unread
