"""The rows that the stage thinker ends with: of each sense as many as it still has to learn, or to keep.

    rows/*.train.jsonl -> mixture/rows.jsonl

A mixture in proportion to the rows teaches what is easy within the first thousand steps, and reading never: of what the
model sees then, few rows ask for it. No row should come twice: pictures that came three times were known by heart, and
others in the same fonts were read no better than those in fonts that it had never seen.

Questions about media lose some of their small words, so that the model does not depend on the wordings that it knows:
it took an unknown one, which asked whether two digits are the same, for a question after a digit.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.files import write_whole
from scripts.nano.origin import check_origin
from scripts.nano.rows import rows_digest, rows_path

# How often each sense is asked, in parts of all; the others are asked as often as `OTHERS`.
SHARES = {"read": 36.0, "scene": 26.0, "same": 14.0, "digits": 12.0, "written": 10.0, "spell": 8.0, "compare": 6.0}
SHARES |= {"digit": 6.0, "silence": 5.0, "repeat": 5.0, "remember": 3.0} | dict.fromkeys(("add", "move", "when"), 4.0)
OTHERS = 2.5
# Words that a question can do without, and how often it does.
SMALL = frozenset(
    "a am are at can come could did do does for from give has have i in is it look me name now of one please say see "
    "show tell that the then there these they this to what which with you".split()
)
DROPPED = 0.15


def write_mixture(directory: Path, senses: Sequence[str], number: int, seed: int) -> Path:
    """About `number` rows of senses by their shares, in a random order, written unless they are there: their file.

    A sense with fewer rows than its share gives them again. InputError if a mixture of other rows is there.
    """
    file = directory / "mixture" / "rows.jsonl"
    shares = {sense: SHARES.get(sense, OTHERS) for sense in senses}
    origin = {"rows": rows_digest(directory, senses), "number": number, "seed": seed, "shares": shares}
    check_origin(directory, "mixture", [file.parent], origin)
    if file.exists():
        return file
    wanted = {sense: max(1, round(number * share / sum(shares.values()))) for sense, share in shares.items()}
    file.parent.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    write_whole(file, as_rows(loosened(draw, messages) for messages in drawn_rows(directory, wanted, seed)))
    return file


def loosened(draw: np.random.Generator, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which texts beside media lack some of their small words."""
    return [
        one if isinstance(one["content"], str) else one | {"content": _loosened(draw, one["content"])}
        for one in messages
    ]


def _loosened(draw: np.random.Generator, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if all(part["type"] == "text" for part in parts):
        return parts
    return [part | {"text": _without_some(draw, part["text"])} if part["type"] == "text" else part for part in parts]


def _without_some(draw: np.random.Generator, text: str) -> str:
    kept = [word for word in text.split() if word.lower().strip(".,?") not in SMALL or draw.random() >= DROPPED]
    return " ".join(kept) or text


def as_rows(conversations: Iterable[list[dict[str, Any]]]) -> str:
    """Conversations as the lines of a file of rows."""
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)


def drawn_rows(directory: Path, wanted: Mapping[str, int], seed: int) -> list[list[dict[str, Any]]]:
    """The messages of so many training rows of each sense in a random order; more than there are come again.

    Their media are found from a folder beside that of the rows.
    """
    draw, chosen = np.random.default_rng(seed), list[str]()
    for sense, number in wanted.items():
        lines, left = rows_path(directory, sense, "train").read_text().splitlines(), number
        while left > 0:
            chosen += [lines[i] for i in draw.permutation(len(lines))[:left]]
            left -= len(lines)
    return [json.loads(chosen[i])["messages"] for i in draw.permutation(len(chosen))]
