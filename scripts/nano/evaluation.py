"""The stage evaluate: the model's greedy answers to the test rows of every sense, kept, and judged when they are read.

    rows/<sense>.test.jsonl -> replies -> evaluation/<model>-<dtype>/<sense>.json -> judging -> results

A file holds replies and a digest of all that was asked, with the bytes of the media; replies to other questions are
not read, and asked for anew. Results of several models, types and limits lie side by side. `results_of` says what
results hold.
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
from omni_jax.inputs.messages import KINDS
from omni_jax.omni import Messages, Omni
from omni_jax.rows.media import check_there, located
from omni_jax.weights.locate import locate
from omni_jax.weights.manifest import identity
from omni_jax.weights.parts import PARTS
from scripts.nano.judging import confusion, interval, interval_of_groups, is_right, is_verbatim
from scripts.nano.rows import rows_path
from scripts.nano.voices import VOICES

# Conversations that are answered at once, and the longest answer in tokens.
BATCH, LONGEST = 32, 96
# Wrong replies that are kept of each sense.
FAILURES = 5
# The senses whose digits are confused, and those of whose sounds the file's name holds the voice.
CONFUSED = ("digit", "written")
VOICED = ("digit", "digits", "silence", "heard")

Row = dict[str, Any]
Results = dict[str, Any]


class Evaluator:
    """A model that answers conversations, and the directory where its replies are kept.

    dtype: "float32" or "bfloat16", or "int8" for experts in eight bits beside float32. limit: the most rows of each
    sense; None for all. speaks: whether answers are spoken too.
    """

    def __init__(
        self,
        model: str | Path,
        output: Path,
        limit: int | None = None,
        dtype: str = "float32",
        speaks: bool = False,
    ):
        self.model, self.limit, self.dtype = locate(model), limit, dtype
        self.parts = (*PARTS,) if speaks else ("thinker",)
        self.identity, self._omni = identity(self.model), None
        first = "" if limit is None else f"-first{limit}"
        self.folder = output / "evaluation" / f"{self.identity[:12]}-{dtype}{first}"

    @property
    def omni(self) -> Omni:
        """The model, read when it is first asked."""
        held = {"quantize": "int8"} if self.dtype == "int8" else {"dtype": self.dtype}
        self._omni = self._omni or omni_jax.load(self.model, parts=self.parts, **held)
        return self._omni

    def kept(self, name: str, digest: str) -> dict[str, Any] | None:
        """What is kept under a name, if it is of this model and of what `digest` stands for."""
        path = self.folder / f"{name}.json"
        held = json.loads(path.read_text()) if path.exists() else {}
        return held if held.get("of") == self._of(digest) else None

    def keep(self, name: str, digest: str, values: Mapping[str, Any]) -> None:
        """Write values under a name, as a whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held = {"of": self._of(digest), **values}
        write_whole(self.folder / f"{name}.json", json.dumps(held, indent=1, ensure_ascii=False) + "\n")

    def kept_replies(self, name: str, conversations: Sequence[Messages]) -> list[str] | None:
        """The replies to conversations that are kept under a name; None if there are none to just these."""
        held = self.kept(name, digest_of(conversations, LONGEST))
        return None if held is None else held["replies"]

    def replies(self, name: str, conversations: Sequence[Messages]) -> list[str]:
        """The greedy replies to conversations, those that are kept under a name or new ones, which are kept."""
        if (held := self.kept_replies(name, conversations)) is not None:
            return held
        replies, seconds = self.timed_answers(conversations)
        self.keep_replies(name, conversations, replies, seconds)
        return replies

    def keep_replies(self, name: str, conversations: Sequence[Messages], replies: list[str], seconds: float) -> None:
        """Keep the replies to conversations under a name."""
        self.keep(name, digest_of(conversations, LONGEST), {"seconds": seconds, "replies": replies})

    def timed_answers(self, conversations: Sequence[Messages]) -> tuple[list[str], float]:
        """The greedy answers to conversations, and the seconds that they took."""
        started, replies = monotonic(), self.answers(conversations)
        return replies, round(monotonic() - started, 1)

    def answers(self, conversations: Sequence[Messages]) -> list[str]:
        """The greedy answers to conversations; batches are of one size, so that few programs are compiled."""
        texts: list[str] = []
        for begin in range(0, len(conversations), BATCH):
            batch = list(conversations[begin : begin + BATCH])
            filled = batch + batch[:1] * (BATCH - len(batch) if begin else 0)
            replies = self.omni.generate(filled, max_new_tokens=LONGEST)
            texts += [reply.text for reply in replies[: len(batch)]]
        return texts

    def _of(self, digest: str) -> dict[str, Any]:
        return {"model": self.identity, "dtype": self.dtype, "limit": self.limit, "asked": digest}


def digest_of(conversations: Sequence[Messages], *settings: Any) -> str:
    """A hash of what is asked: messages, settings and the bytes of media, be they in files or in the messages."""
    found = sha256(json.dumps(settings).encode())
    for messages in conversations:
        described = [(one["role"], _described(one["content"])) for one in messages]
        found.update(json.dumps(described, sort_keys=True).encode() + b"\n")
    return found.hexdigest()[:16]


def _described(content: str | list[dict[str, Any]]) -> Any:
    """A message's content with a hash in the place of each medium."""
    if isinstance(content, str):
        return content
    return [
        {name: _hash(value) if name == part["type"] in KINDS else value for name, value in part.items()}
        for part in content
    ]


def _hash(medium: str | Path | bytes) -> str:
    if not isinstance(medium, bytes):
        check_there(Path(medium))
        medium = Path(medium).read_bytes()
    return sha256(medium).hexdigest()


def evaluate_sense(evaluator: Evaluator, output: Path, sense: str) -> Results:
    """The results of a sense, of replies that are kept or new ones."""
    rows = rows_for_test(output, sense, evaluator.limit)
    return results_of(sense, rows, evaluator.replies(sense, questions(rows, output)))


def read_sense(evaluator: Evaluator, output: Path, sense: str) -> Results | None:
    """The results of a sense, of replies that are kept; None without them or without rows."""
    if not rows_path(output, sense, "test").exists():
        return None
    rows = rows_for_test(output, sense, evaluator.limit)
    replies = evaluator.kept_replies(sense, questions(rows, output))
    return None if replies is None else results_of(sense, rows, replies)


def rows_for_test(output: Path, sense: str, limit: int | None) -> list[Row]:
    """The first test rows of a sense; InputError if they were not made."""
    path = rows_path(output, sense, "test")
    if not path.exists():
        raise InputError(f"{path} is missing; run the stage data first")
    return rows_of(path.read_text(), limit)


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


def interval_of(results: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of 95 % of the share that is right: Wilson's, or where voices are known the wider one over voices.

    What has no voice, as noise has none, is a group of its own.
    """
    low, high = interval(results["right"], results["samples"])
    known, groups = {voice.name for voice in VOICES}, []
    for name, (right, number) in results.get("voices", {}).items():
        groups += [(right, number)] if name in known else [(1, 1)] * right + [(0, 1)] * (number - right)
    if not groups:
        return low, high
    lowest, highest = interval_of_groups(groups)
    return min(low, lowest), max(high, highest)


def by_origin(voices: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The right ones and all of recorded people and of synthetic voices; sounds without a voice are neither."""
    kinds, found = {voice.name: voice.kind for voice in VOICES}, {}
    for name, (right, number) in voices.items():
        if name in kinds:
            origin = "recorded people" if kinds[name] == "recorded" else "synthetic voices"
            before = found.get(origin, [0, 0])
            found[origin] = [before[0] + right, before[1] + number]
    return dict(sorted(found.items()))


def line_of(name: str, results: Mapping[str, Any]) -> str:
    """A line of the printed table."""
    low, high = interval_of(results)
    share = results["right"] / max(1, results["samples"])
    return f"{name:18}{results['right']:5} of {results['samples']:4}  {share:6.1%}  ({low:.1%} to {high:.1%})"
