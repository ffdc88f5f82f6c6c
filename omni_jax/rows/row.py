"""One row: its plain values, or the problem that it has."""

from dataclasses import dataclass
from typing import Any

from omni_jax.errors import InputError, OmniError
from omni_jax.files import reason_of


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: where it is ("file:line"), and why."""

    where: str
    why: str


def reason(error: Exception) -> str:
    """Why a row cannot be used, in one sentence. Whatever was raised counts as the row's failure, not the run's."""
    if isinstance(error, OmniError):
        return str(error)
    return f"{reason_of(error)} ({type(error).__name__}); repair the row or its media, or leave it out"


def plain_row(row: Any) -> dict[str, Any]:
    """A row of `rows_of` without null, with which tables fill absent fields; InputError for what is no row."""
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"the row is of type {type(row).__name__}; write a JSON object")
    try:
        return _plain(row)
    except RecursionError as error:
        raise InputError("the row is nested too deeply") from error


def _plain(value: Any) -> Any:
    """A value without null; InputError for text that cannot be encoded."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{value[:40]!r} is no text: it holds half of a surrogate pair") from error
    return [_plain(item) for item in value] if isinstance(value, list) else value
