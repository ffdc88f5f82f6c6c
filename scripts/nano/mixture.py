"""The rows that the stage thinker ends with: of each sense as many as it still has to learn, or to keep.

    rows/*.train.jsonl -> mixture/rows.jsonl

A mixture in proportion to the rows teaches what is easy within the first thousand steps, and reading never: of what the
model sees then, one row of twelve asks for it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from omni_jax.files import write_whole
from scripts.nano.origin import check_origin, rows_digest
from scripts.nano.rows import rows_path

# How often each sense is asked, in parts of all; the others are asked as often as `OTHERS`.
SHARES = {"read": 24.0, "scene": 18.0, "compare": 18.0, "remember": 8.0, "move": 3.0}
SHARES |= dict.fromkeys(("same", "spell", "digits"), 6.0) | dict.fromkeys(("add", "when", "silence", "written"), 4.0)
OTHERS = 2.0


def write_mixture(directory: Path, senses: Sequence[str], number: int, seed: int) -> Path:
    """About `number` rows of senses by their shares, in a random order, written unless they are there: their file.

    A sense with fewer rows than its share gives them again. InputError if a mixture of other rows is there.
    """
    file = directory / "mixture" / "rows.jsonl"
    origin = {"rows": rows_digest(directory, senses), "number": number, "seed": seed}
    check_origin(directory, "mixture", [file.parent], origin)
    if file.exists():
        return file
    shares = {sense: SHARES.get(sense, OTHERS) for sense in senses}
    wanted = {sense: max(1, round(number * share / sum(shares.values()))) for sense, share in shares.items()}
    file.parent.mkdir(exist_ok=True)
    write_whole(file, "".join(line + "\n" for line in drawn_rows(directory, wanted, seed)))
    return file


def drawn_rows(directory: Path, wanted: Mapping[str, int], seed: int) -> list[str]:
    """So many training rows of each sense in a random order, their messages alone; more than there are come again.

    Their media are found from a folder beside that of the rows.
    """
    draw, chosen = np.random.default_rng(seed), list[str]()
    for sense, number in wanted.items():
        lines, left = rows_path(directory, sense, "train").read_text().splitlines(), number
        while left > 0:
            chosen += [lines[i] for i in draw.permutation(len(lines))[:left]]
            left -= len(lines)
    return [json.dumps({"messages": json.loads(chosen[i])["messages"]}) for i in draw.permutation(len(chosen))]
