"""The stage prompts: test prompts on which drafters are compared, as `scripts.bench drafters` and `evaluate` read them.

    rows/*.test.jsonl -> prompts/text.jsonl (prompt, reference), prompts/media.jsonl (messages, reference)

Prompts of text have one turn, because `scripts.bench drafters` asks no more; those with media have all of a row's, and
are read from a folder beside the media. Senses take turns, so that the first prompts are of all of them.
"""

import json
from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from omni_jax.files import write_whole
from scripts.nano.evaluation import Row, question_of, rows_for_test

COUNT = 80
TEXT = ("count", "add", "spell", "repeat")
MEDIA = ("digit", "digits", "written", "scene", "compare", "move", "flash", "same")


def write_prompts(output: Path, count: int = COUNT) -> dict[str, int]:
    """Write the first `count` prompts of text and of media: the number of each. InputError without rows of a sense."""
    folder, written = output / "prompts", {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, senses, form in (("text", TEXT, text_prompt), ("media", MEDIA, media_prompt)):
        lines = [json.dumps(form(row), ensure_ascii=False) + "\n" for row in in_turn(output, senses, count)]
        write_whole(folder / f"{name}.jsonl", "".join(lines))
        written[name] = len(lines)
    return written


def in_turn(output: Path, senses: Sequence[str], count: int) -> list[Row]:
    """The first `count` test rows of senses, one of each in turn."""
    turns = zip_longest(*(rows_for_test(output, sense, None) for sense in senses))
    return list(islice((row for turn in turns for row in turn if row is not None), count))


def text_prompt(row: Row) -> dict[str, Any]:
    """A row of one question in text."""
    return {"prompt": question_of(row), **_told(row)}


def media_prompt(row: Row) -> dict[str, Any]:
    """A row of any questions."""
    return {"messages": row["messages"][:-1], **_told(row)}


def _told(row: Row) -> dict[str, Any]:
    return {"id": row["id"], "category": row["sense"], "reference": row["messages"][-1]["content"]}
