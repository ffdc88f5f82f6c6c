"""The rows that the stage thinker ends with: of each sense as many as it still has to learn, or to keep.

    rows/*.train.jsonl -> mixture/rows.jsonl

A mixture in proportion to the rows teaches what is easy within the first thousand steps, and reading never: of what the
model sees then, one row of twelve asks for it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omni_jax.files import write_whole
from scripts.nano.origin import check_origin, rows_digest
from scripts.nano.rows import rows_path

# How often each sense is asked, in parts of all; the others are asked as often as `OTHERS`.
SHARES = {"read": 26.0, "scene": 16.0, "compare": 16.0} | dict.fromkeys(("same", "spell", "digits"), 6.0)
SHARES |= {"move": 5.0, "add": 4.0}
OTHERS = 2.5


def write_mixture(directory: Path, senses: Sequence[str], number: int, seed: int) -> Path:
    """About `number` rows of senses by their shares, in a random order, written unless they are there: their file.

    A sense with fewer rows than its share gives them again. InputError if a mixture of other rows is there.
    """
    file = directory / "mixture" / "rows.jsonl"
    origin = {"rows": rows_digest(directory, senses), "number": number, "seed": seed}
    check_origin(directory, "mixture", [file.parent], origin)
    if file.exists():
        return file
    shares, draw, chosen = {sense: SHARES.get(sense, OTHERS) for sense in senses}, np.random.default_rng(seed), []
    for sense, share in shares.items():
        lines, count = rows_path(directory, sense, "train").read_text().splitlines(), 0
        wanted = max(1, round(number * share / sum(shares.values())))
        while count < wanted:
            taken = draw.permutation(len(lines))[: wanted - count]
            chosen += [json.loads(lines[i]) for i in taken]
            count += len(taken)
    file.parent.mkdir(exist_ok=True)
    rows = ({"messages": chosen[i]["messages"]} for i in draw.permutation(len(chosen)))
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file
