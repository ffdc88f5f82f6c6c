"""Results as they are read back: a directory of results is a stranger's until each line of it has been checked.

A result is a JSON object with the sample's id, category and scores, a digest of its media if it names files, and either
what was made (`turns`, each with text, token_ids and stats) or an error.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.rows import MAX_ROW_BYTES
from omni_jax.files import parse_json, reason_of

Result = dict[str, Any]

_NUMBER = (int, float)
_FIELDS = {"id": str, "category": str, "scores": dict}
_OPTIONAL = {"media": str, "error": str, "turns": list}
_TURN = {"text": str, "token_ids": list, "stats": dict}
_STATS = {"new_tokens": int, "finish_reason": str}
_DRAFTED = {"round_tokens": list, "round_most": list, "tokens_per_round": _NUMBER}
_SPOKEN = {"audio_seconds": _NUMBER, "compiled": int} | {
    f"{part}_seconds": _NUMBER for part in ("prefill", "decode", "talker", "vocoder")
}


def read_all(directory: Path) -> list[Result]:
    """All results in a directory."""
    return [result for file in sorted(directory.glob("results-*.jsonl")) for result in read_results(file)]


def read_results(file: Path) -> Iterator[Result]:
    """The results in a file, whole lines only; InputError for a line that is no result."""
    if not file.is_file():
        raise InputError(f"{file} is not a regular file; choose another directory")
    try:
        with file.open("rb") as lines:
            number = 0
            while (line := lines.readline(MAX_ROW_BYTES)).endswith(b"\n"):
                number += 1
                yield _checked(line, f"{file}:{number}")
            if len(line) == MAX_ROW_BYTES:
                raise InputError(f"{file}:{number + 1} is longer than {MAX_ROW_BYTES:,} bytes; remove the line")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({reason_of(error)}); choose another directory") from error


def fits(result: Result, sample: Sample) -> bool:
    """Whether a result of a sample's id was made with the media that the sample names, as they are now."""
    return result.get("media", "") == sample.media


def _checked(line: bytes, where: str) -> Result:
    try:
        result = parse_json(line, "the line", error=InputError)
        _check(result, _FIELDS, "the result")
        _check(result, {name: kind for name, kind in _OPTIONAL.items() if name in result}, "the result")
        _check(result["scores"], dict.fromkeys(result["scores"], _NUMBER), "the scores")
        for turn in result.get("turns", ()):
            _check(turn, _TURN, "a turn")
            stats = turn["stats"]
            rounds, audio = bool(stats.get("rounds")), bool(stats.get("audio_seconds"))
            _check(stats, _STATS | (_DRAFTED if rounds else {}) | (_SPOKEN if audio else {}), "the stats")
            for name in _DRAFTED if rounds else ():
                _check_numbers(stats[name], name)
    except InputError as error:
        remedy = "remove the line, and its sample is done again"
        raise InputError(f"{where} is damaged ({error}); {remedy}") from error
    return result


def _check(values: Any, needed: Mapping[str, Any], what: str) -> None:
    """Raise InputError unless `values` is an object with what is needed, each of its type."""
    if not isinstance(values, dict):
        raise InputError(f"{what} is of type {type(values).__name__}")
    for name, kind in needed.items():
        if name not in values:
            raise InputError(f"{what} has no {name!r}")
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise InputError(f"{name!r} of {what} is of type {type(values[name]).__name__}")


def _check_numbers(values: Any, name: str) -> None:
    values = values if isinstance(values, list) else [values]
    if not all(isinstance(value, _NUMBER) and not isinstance(value, bool) for value in values):
        raise InputError(f"{name!r} holds something that is no number")
