"""The stage evaluate: the model's greedy answers to the test rows of every sense, judged, one file of results for each.

    rows/<sense>.test.jsonl -> answers -> evaluation/<sense>.json

A file says which model, rows and limit it is of; where these are the same it is kept, so that a run goes on where it
stopped. `results_of` says what it holds.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import omni_jax
from omni_jax.errors import InputError
from omni_jax.files import write_whole
from omni_jax.omni import Messages, Omni
from omni_jax.rows.media import located
from omni_jax.weights.manifest import identity
from scripts.nano.judging import confusion, interval, is_right, is_verbatim
from scripts.nano.rows import rows_path

# Conversations that are answered at once, and the longest answer in tokens.
BATCH, LONGEST = 32, 64
# Wrong replies that are kept of each sense.
FAILURES = 5
# The senses whose digits are confused, and those of whose sounds the file's name holds the voice.
CONFUSED = ("digit", "written")
VOICED = ("digit", "digits", "silence", "heard")

Row = dict[str, Any]
Results = dict[str, Any]


class Asked:
    """A model that answers rows, and the directory where results are kept."""

    def __init__(self, model: Path, output: Path, limit: int | None, parts: tuple[str, ...] = ("thinker",)):
        self.model, self.folder, self.limit, self.parts = model, output / "evaluation", limit, parts
        self.identity, self._omni = identity(model), None
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def omni(self) -> Omni:
        """The model, read when it is first asked."""
        self._omni = self._omni or omni_jax.load(self.model, parts=self.parts)
        return self._omni

    def kept(self, name: str, of: str) -> Results | None:
        """The results of a name, if they are of this model and limit and of what `of` says."""
        path = self.folder / f"{name}.json"
        held = json.loads(path.read_text()) if path.exists() else {}
        return held if held.get("of") == self._of(of) else None

    def keep(self, name: str, of: str, results: Results) -> Results:
        """Write results under a name, as a whole."""
        results = {"of": self._of(of), **results}
        write_whole(self.folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
        return results

    def answers(self, conversations: Sequence[Messages]) -> list[str]:
        """The greedy answers to conversations; batches are of one size, so that few programs are compiled."""
        texts: list[str] = []
        for begin in range(0, len(conversations), BATCH):
            batch = list(conversations[begin : begin + BATCH])
            filled = batch + batch[:1] * (BATCH - len(batch) if begin else 0)
            replies = self.omni.generate(filled, max_new_tokens=LONGEST)
            texts += [reply.text for reply in replies[: len(batch)]]
        return texts

    def _of(self, of: str) -> dict[str, Any]:
        return {"model": self.identity, "rows": sha256(of.encode()).hexdigest()[:16], "limit": self.limit}


def evaluate_sense(asked: Asked, output: Path, sense: str) -> Results:
    """The results of a sense, those that are kept or new ones."""
    text = _text(output, sense)
    if held := asked.kept(sense, text):
        return held
    started, rows = monotonic(), rows_of(text, asked.limit)
    replies = asked.answers(questions(rows, output))
    return asked.keep(sense, text, results_of(sense, rows, replies) | {"seconds": round(monotonic() - started, 1)})


def _text(output: Path, sense: str) -> str:
    path = rows_path(output, sense, "test")
    if not path.exists():
        raise InputError(f"{path} is missing; run the stage data first")
    return path.read_text()


def rows_for_test(output: Path, sense: str, limit: int | None) -> list[Row]:
    """The first test rows of a sense; InputError if they were not made."""
    return rows_of(_text(output, sense), limit)


def rows_of(text: str, limit: int | None) -> list[Row]:
    """The first rows of a file's text; of those that ask the same, as rows of text alone may, only one."""
    rows = map(json.loads, text.splitlines())
    return list({json.dumps(row["messages"]): row for row in rows}.values())[:limit]


def questions(rows: Sequence[Row], output: Path) -> list[Messages]:
    """What each row asks: all its messages but the last, with the places of their media."""
    return [located(row["messages"][:-1], output / "rows") for row in rows]


def results_of(sense: str, rows: Sequence[Row], replies: Sequence[str]) -> Results:
    """What came of a sense: counts, a few failures, and where it has them digits confused and counts by voice."""
    right = [is_right(row, reply) for row, reply in zip(rows, replies, strict=True)]
    wrong = [(row, reply) for row, reply, good in zip(rows, replies, right, strict=True) if not good]
    results: Results = {
        "samples": len(rows),
        "right": sum(right),
        "verbatim": sum(map(is_verbatim, rows, replies)),
        "failures": [
            {"asked": question_of(row), "right": row["messages"][-1]["content"], "reply": reply, "media": media_of(row)}
            for row, reply in wrong[:FAILURES]
        ],
    }
    if sense in CONFUSED:
        results["confusion"] = confusion(rows, replies)
    if sense in VOICED:
        results["voices"] = by_voice(rows, right)
    return results


def by_voice(rows: Sequence[Row], right: Sequence[bool]) -> dict[str, list[int]]:
    """The right ones and all of each voice, which is in the name of a row's first file."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row, good in zip(rows, right, strict=True):
        voice = Path(media_of(row)[0]).stem.split("-", 1)[1].removeprefix("first-")
        found[voice][0] += good
        found[voice][1] += 1
    return dict(sorted(found.items()))


def question_of(row: Mapping[str, Any]) -> str:
    """The text of a row's last question."""
    content = row["messages"][-2]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


def media_of(row: Mapping[str, Any]) -> list[str]:
    """The files that a row names, in order."""
    contents = [one["content"] for one in row["messages"] if not isinstance(one["content"], str)]
    return [part[part["type"]] for content in contents for part in content if part["type"] != "text"]


def line_of(name: str, results: Mapping[str, Any]) -> str:
    """A line of the printed table."""
    low, high = interval(results["right"], results["samples"])
    share = results["right"] / max(1, results["samples"])
    return f"{name:18}{results['right']:5} of {results['samples']:4}  {share:6.1%}  ({low:.1%} to {high:.1%})"
