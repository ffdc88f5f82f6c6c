"""All rows of a dataset, read once before training: its samples and their lengths, and which rows cannot be used.

What is wrong with data shows before the first step, and the number of steps is known. A text is tokenised here and not
again; media are opened, so that each is known to be there, and decoded only when a batch is made.
"""

import pickle
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from omni_jax.errors import InputError
from omni_jax.files import user_path
from omni_jax.rows.files import data_files, digest_of, rows_of
from omni_jax.rows.row import Problem, plain_row, reason
from omni_jax.train.data.recipe import Recipe
from omni_jax.train.data.spool import Spool
from omni_jax.train.data.workers import Workers, result_of

CHUNK = 64  # rows that a worker reads at once
AHEAD = 4  # chunks per worker that are under way
SHOWN = 10  # problems that are listed
SHOWN_AFTER = 1.0  # seconds of reading
Row = tuple[str, Path, Any]  # as `rows_of` gives them


@dataclass(frozen=True, eq=False)
class Survey:
    """What a dataset holds: pickled samples, their lengths in tokens int [n], and the SHA-256 of its files.

    problems: rows that cannot be used, in order. unread: names of columns that are not read.
    """

    samples: Spool
    lengths: np.ndarray
    digest: str
    problems: list[Problem]
    unread: tuple[str, ...]

    def report(self) -> str:
        """What is not used, as lines of text; "" if all is."""
        said = [f"columns that are not read: {', '.join(self.unread)}"] if self.unread else []
        if self.problems:
            said += [f"{len(self.problems)} rows are left out:\n{report_of(self.problems)}"]
        return "\n".join(said)


def survey(paths: Iterable[str | Path], workers: Workers, *, strict: bool = False) -> Survey:
    """Read all rows of files and directories of files.

    strict: raise InputError at the first row that cannot be used. InputError where no row can be used.
    """
    files = [file for path in paths for file in data_files(user_path(path, "the dataset"), None)]
    samples, lengths, problems, unread = Spool(), list[int](), list[Problem](), set[str]()
    for made, wrong, columns in _read(tqdm(rows_of(files), "reading", unit="row", leave=False, file=sys.stderr,
                                           disable=None, delay=SHOWN_AFTER), workers):  # fmt: skip
        for length, sample in made:
            samples.append(sample)
            lengths.append(length)
        problems += wrong
        unread |= columns
        if strict and problems:
            raise InputError(f"{problems[0].where}: {problems[0].why}")
    if not lengths:
        names = ", ".join(str(path) for path in paths)
        raise InputError(f"{names or 'no dataset was named'}: no row can be used\n{report_of(problems)}".rstrip())
    return Survey(samples, np.array(lengths), digest_of(files), problems, tuple(sorted(unread)))


def report_of(problems: list[Problem]) -> str:
    """Problems as lines of text, the first ones and how many more there are."""
    lines = [f"  {problem.where}: {problem.why}" for problem in problems[:SHOWN]]
    return "\n".join([*lines, f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else lines)


def _read(rows: Iterable[Row], workers: Workers) -> Iterator[Any]:
    """What `_read_chunk` returns for all rows, in their order."""
    running, left = deque[Any](), iter(rows)
    while chunk := tuple(islice(left, CHUNK)):
        running.append(workers.submit(_read_chunk, chunk))
        if len(running) > AHEAD * workers.count:
            yield result_of(running.popleft())
    while running:
        yield result_of(running.popleft())


def _read_chunk(recipe: Recipe, rows: Iterable[Row]) -> tuple[list[tuple[int, bytes]], list[Problem], set[str]]:
    """The samples of rows, each pickled and with its length; rows that cannot be used; columns that are not read."""
    made, problems, unread = list[tuple[int, bytes]](), list[Problem](), set[str]()
    for where, folder, row in rows:
        try:
            plain = plain_row(row)
            unread |= recipe.columns.check(plain)
            made += [(s.length, pickle.dumps(s)) for s in recipe.samples(plain, folder, where)]
        except Exception as error:
            problems.append(Problem(where, reason(error)))
    return made, problems, unread
