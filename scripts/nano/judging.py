"""Whether a reply is right, how sure a share of right ones is, and which digits are taken for which.

A sense is judged by one of two rules, on words in lower case without punctuation:

| rule | senses | a reply is right if |
|---|---|---|
| key words | those of `RIVALS` | of the words that answers choose from, it holds the right ones alone, each once |
| sentence | all others | it is the right sentence, word for word |

Where the right answer first names what is seen, up to a colon, a reply is judged by what follows its first colon: what
it has named before is not judged, but for `verbatim`.

So "The digit is seven." is right by its only number, "I see five and hear three: no, they are not the same." by its
"no", "One thing, then three things: the second picture has more things." by its "second"; a string, a count or a
spelling must be right as a whole and in order, and so must a scene's sentence, or what follows its colon.
`verbatim` of a result is the share that is the right sentence, by whichever rule the sense is judged.
"""

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import numpy as np

from scripts.nano.scenes import ORDINALS
from scripts.nano.words import DIGITS, NUMBERS

# What the answers of a sense choose from, of which a right reply holds the answer's alone.
RIVALS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("digit", "written", "heard", "red", "when"), frozenset(NUMBERS)),
    "silence": frozenset({"silence", "noise", "beep", "music", *NUMBERS}),
    "flash": frozenset({"flash", "beep"}),
    "same": frozenset({"yes", "no"}),
    "compare": frozenset({"yes", "no", "colour", "shape", "place", *ORDINALS}),
}

# The quantile of the normal distribution for intervals of 95 %.
Z = 1.959964
# Resamples of the groups for a bootstrap interval, and the percentiles that bound it.
RESAMPLES, PERCENTILES = 2000, (2.5, 97.5)


def words(text: str) -> list[str]:
    """The words of a text in lower case; letters with a comma between them are words."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", " "))


def is_right(row: Mapping[str, Any], reply: str) -> bool:
    """Whether a reply answers a row."""
    said = row["messages"][-1]["content"]
    if ":" in said:
        said, reply = (text.partition(":")[2] or text for text in (said, reply))
    rivals = RIVALS.get(row["sense"])
    if rivals is None:
        return words(reply) == words(said)
    return [word for word in words(reply) if word in rivals] == words(row["answer"])


def is_verbatim(row: Mapping[str, Any], reply: str) -> bool:
    """Whether a reply is the right sentence, word for word."""
    return words(reply) == words(row["messages"][-1]["content"])


def interval(right: int, number: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share of `right` of `number`."""
    if not number:
        return 0.0, 1.0
    share, spread = right / number, Z * Z / number
    middle, half = share + spread / 2, Z * sqrt(share * (1 - share) / number + spread / number / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def interval_of_groups(groups: Sequence[tuple[int, int]], seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of 95 % of a share, where samples of one group resemble each other.

    groups: the right ones and all of each, such as those of a voice; groups are resampled, not samples.
    """
    counts, draw = np.array(groups), np.random.default_rng(seed)
    right, number = counts[draw.integers(0, len(counts), (RESAMPLES, len(counts)))].sum(axis=1).T
    low, high = np.percentile(right / number, PERCENTILES)
    return float(low), float(high)


def confusion(rows: Sequence[Mapping[str, Any]], replies: Sequence[str]) -> list[list[int]]:
    """How often each digit was answered as each, [10, 11]; the last column is for replies without exactly one."""
    table = [[0] * 11 for _ in DIGITS]
    for row, reply in zip(rows, replies, strict=True):
        if row["answer"] in DIGITS:
            said = [DIGITS.index(word) for word in words(reply) if word in DIGITS]
            table[DIGITS.index(row["answer"])][said[0] if len(said) == 1 else 10] += 1
    return table
