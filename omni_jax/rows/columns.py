"""Which columns of a row are read; a row whose media or words would be lost by a wrong name is refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from omni_jax.errors import InputError
from omni_jax.inputs.messages import KINDS

# Names that other formats give to a medium.
_MEDIUM = re.compile(rf"({'|'.join(KINDS)})s?([_-]?(url|path|file)s?)?", re.IGNORECASE)
_NEAR = 0.8  # of difflib's likeness; a letter too many, too few or changed in a word of five, or two swapped


@dataclass(frozen=True)
class Columns:
    """The columns that rows of a kind have.

    groups: names of which a row has one. media: the column of each kind of medium. others: further names that a user
    may miss by a letter. free: names that are short or common, so that a name near them says nothing.
    """

    groups: tuple[tuple[str, ...], ...]
    media: Mapping[str, str]
    others: tuple[str, ...]
    free: tuple[str, ...]

    def check(self, row: Mapping[str, Any]) -> set[str]:
        """The columns of a row that are not read; InputError for one that seems to be misnamed.

        Near misses of a column count only where the row has no such column itself.
        """
        meant = [*(name for group in self.groups for name in group), *self.media.values(), *self.others]
        unread = {k for k, value in row.items() if k not in (*meant, *self.free) and value not in ("", [], {})}
        taken = {name for group in self.groups if any(one in row for one in group) for name in group}
        missing = [name for name in meant if name not in row and name not in taken]
        for name in sorted(unread):
            self._check_medium(name, missing, row)
            # People rarely miss the first letter: "preference" is a word of its own.
            if near := get_close_matches(name.lower(), [m for m in missing if m[0] == name[:1].lower()], 1, _NEAR):
                raise InputError(f"the column {name!r} is not read; write {near[0]!r} if that is meant, or rename it")
        return unread

    def _check_medium(self, name: str, missing: list[str], row: Mapping[str, Any]) -> None:
        medium = _MEDIUM.fullmatch(name)
        kind = medium[1].lower() if medium is not None else None
        if kind is not None and self.media[kind] in missing and not _holds(row.get("messages"), kind):
            where = "its part of the messages" if "messages" in row else f"{self.media[kind]!r}, which may be a list"
            raise InputError(f"the column {name!r} is not read; write {where}")


def _holds(messages: Any, kind: str) -> bool:
    """Whether a part of the messages is a medium of a kind, in any form; nothing else is checked."""
    contents = [message.get("content") for message in messages or () if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and kind in str(part.get("type")) for part in parts)
