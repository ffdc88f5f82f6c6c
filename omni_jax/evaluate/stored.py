"""Results as they are read back. A directory of results may come from anywhere, so each line is checked.

A result is a JSON object with the sample's id, category and scores, a digest of its media if it names files, and either
what was made (`turns`, each with text, token_ids and stats) or an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.evaluate.data import Sample
from omni_jax.files import parse_json, reason_of
from omni_jax.rows.files import MAX_ROW_BYTES, RESULTS

Result = dict[str, Any]

_NUMBER = (int, float)
_FIELDS = {"id": str, "category": str, "scores": dict}
_OPTIONAL = {"media": str, "error": str, "turns": list}
_TURN = {"text": str, "token_ids": list, "stats": dict}
_STATS = {"new_tokens": int, "finish_reason": str}
_DRAFTED = {"round_tokens": list, "round_most": list, "tokens_per_round": _NUMBER}
_SPOKEN = {"audio_seconds": _NUMBER, "share_seconds": _NUMBER, "compiled": int}
# Scores that are counts; pairs that are summed over samples: errors, and what they are counted in.
_COUNTS = {"word_errors", "words", "character_errors", "characters", "tokens", "bytes"}
_RATES = (("word_errors", "words"), ("character_errors", "characters"))
MOST = 10**15  # of a count, of seconds, and of a score that is a whole number; sums of many are still exact


class StoredResults:
    """The results in a directory. Each line is read once, however often new ones are looked for."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[Path, _ResultFile] = {}

    def read(self) -> list[Result]:
        """All results that are there now, those of each process in order; InputError for a line that is no result."""
        for path in sorted(self.directory.glob(RESULTS)):
            self._files.setdefault(path, _ResultFile(path)).read()
        return [result for path in sorted(self._files) for result in self._files[path].results]


def read_all(directory: Path) -> list[Result]:
    """All results in a directory."""
    return StoredResults(directory).read()


@dataclass(eq=False)
class _ResultFile:
    """A file of results as far as it was read: whole lines only."""

    path: Path
    end: int = 0
    lines: int = 0
    results: list[Result] = field(default_factory=list)

    def read(self) -> None:
        """Read the lines that are new."""
        if not self.path.is_file():
            raise InputError(f"{self.path} is not a regular file; choose another directory")
        try:
            with self.path.open("rb") as data:
                data.seek(self.end)
                while (line := data.readline(MAX_ROW_BYTES)).endswith(b"\n"):
                    self._take(line)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({reason_of(error)}); choose another directory") from error
        if len(line) == MAX_ROW_BYTES:
            what = f"is longer than {MAX_ROW_BYTES:,} bytes; remove the line"
            raise InputError(f"{self.path}:{self.lines + 1} {what}")

    def _take(self, line: bytes) -> None:
        self.end, self.lines = self.end + len(line), self.lines + 1
        if line.strip():
            self.results.append(_checked(line, f"{self.path}:{self.lines}"))


def fits(result: Result, sample: Sample) -> bool:
    """Whether a result of a sample's id was made with the media that the sample names, as they are now."""
    return result.get("media", "") == sample.media


def _checked(line: bytes, where: str) -> Result:
    try:
        result = parse_json(line, "the line", error=InputError)
        _check(result, _FIELDS, "the result")
        _check(result, {name: kind for name, kind in _OPTIONAL.items() if name in result}, "the result")
        _check_scores(result["scores"])
        for turn in result.get("turns", ()):
            _check(turn, _TURN, "a turn")
            _check_stats(turn["stats"])
    except InputError as error:
        remedy = "remove the line, and its sample is done again"
        raise InputError(f"{where} is damaged ({error}); {remedy}") from error
    return result


def _check_scores(scores: dict[str, Any]) -> None:
    """Scores are any numbers, NaN and infinities too; counts are amounts, and errors need what they are counted in."""
    _check(scores, dict.fromkeys(scores, _NUMBER), "'scores'")
    for name, value in scores.items():
        _check_amount(value if name in _COUNTS else abs(value) if isinstance(value, int) else 0, name)
    for errors, size in _RATES:
        if (errors in scores) != (size in scores):
            raise InputError(f"'scores' has one of {errors!r} and {size!r}, which go together")


def _check_stats(stats: dict[str, Any]) -> None:
    needed = dict(_STATS)
    needed |= _DRAFTED if stats.get("rounds") else {}
    needed |= _SPOKEN if stats.get("audio_seconds") else {}
    _check(stats, needed, "'stats'")
    for name in needed:
        for value in stats[name] if isinstance(stats[name], list) else [stats[name]]:
            if needed[name] is not str:
                _check_amount(value, name)
    if stats.get("rounds") and len(stats["round_tokens"]) != len(stats["round_most"]):
        raise InputError("'round_tokens' and 'round_most' are of unequal length")


def _check(values: Any, needed: Mapping[str, Any], what: str) -> None:
    """Raise InputError unless `values` is an object with what is needed, each of its type."""
    if not isinstance(values, dict):
        raise InputError(f"{what} is of type {type(values).__name__}")
    for name, kind in needed.items():
        if name not in values:
            raise InputError(f"{what} has no {name!r}")
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise InputError(f"{name!r} of {what} is of type {type(values[name]).__name__}")


def _check_amount(value: Any, name: str) -> None:
    if not isinstance(value, _NUMBER) or isinstance(value, bool):
        raise InputError(f"{name!r} holds something that is no number")
    # NaN compares false.
    if not 0 <= value <= MOST:
        raise InputError(f"{name!r} is or holds {str(value)[:24]}, which is no amount")
