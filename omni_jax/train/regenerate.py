"""The target answers the training prompts itself: `omni-jax train regenerate`.

    conversations -> each reply anew, in slots -> JSON Lines of `messages`, with their media as they were

A drafter is to draft what the target says, so it learns most from the target's own replies. A reply is part of the
prompt of the next. Replies that are there are replaced; one that is not to be learned stays, and so does a call of a
tool whose result follows. A question at the end is answered.

The output is appended to as conversations end, each line whole and on the disk before the next, so that a run that was
stopped goes on where it ended. What the replies depend on is in a file of its own beside it.

Source: SpecForge's regeneration of training data.
"""

import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_jax.decode.prompt import Prompt, check_context
from omni_jax.errors import InputError, OmniError
from omni_jax.files import parse_json, read_object, reason_of
from omni_jax.omni import Omni, Reply
from omni_jax.settings import Settings
from omni_jax.weights.drafters import Drafter

AGAIN = "what is written is safe: make room, and run this again"


@dataclass(frozen=True, eq=False)
class Conversation:
    """A row of data: where it is, "file:line"; its messages, with media that are found from any folder; its tools.

    silent: numbers of messages that are not to be learned.
    """

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict] | None = None
    silent: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Regenerated:
    """What came of a run: conversations that were answered, and answered before it; those left out, with the reason."""

    answered: int
    before: int
    left_out: list[str]


def regenerate(
    omni: Omni,
    conversations: Iterable[Conversation],
    output: Path,
    settings: Settings,
    *,
    about: dict[str, Any],
    slots: int | None = None,
    drafter: Drafter | None = None,
    fatal: bool = False,
) -> Regenerated:
    """Answer conversations anew and append each to `output` as it ends.

    Args:
        omni: the model that answers.
        conversations: taken as slots come free; those that `output` holds are passed over.
        output: the JSON Lines; each line holds messages, tools, "source", and for each reply its token ids and why it
            ended.
        settings: of the replies; also how prompts are made.
        about: what the replies depend on besides, plain JSON values; an output of something else is refused.
        slots, drafter: as of `Omni.generate_many`.
        fatal: whether a conversation that cannot be used ends the run; it is left out otherwise.

    InputError for an output that cannot be written or is of something else, and, if `fatal`, for a conversation.
    """
    with _Output(output, about) as lines:
        queue = _Queue(omni, (one for one in conversations if one.where not in lines.held), settings, fatal)
        request = {**vars(settings.sampling), **vars(settings.drafting), "stop": settings.ending.stop}
        limit = settings.ending.max_new_tokens
        replies = omni.generate_many(queue.prompts(), slots=slots, drafter=drafter, max_new_tokens=limit, **request)
        answered = 0
        for number, reply in replies:
            if (line := queue.record(number, reply)) is not None:
                lines.add(line)
                answered += 1
        return Regenerated(answered, len(lines.held), queue.left_out)


@dataclass(eq=False)
class _Running:
    """A conversation as far as it is answered. rest: what follows, None where a reply belongs."""

    given: Conversation
    rest: deque[dict[str, Any] | None]
    messages: list[dict[str, Any]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    @classmethod
    def of(cls, given: Conversation) -> "_Running":
        roles = [message.get("role") for message in given.messages]
        rest: deque[dict[str, Any] | None] = deque()
        for i, message in enumerate(given.messages):
            calls = roles[i + 1 : i + 2] == ["tool"]
            rest.append(None if roles[i] == "assistant" and not calls and i not in given.silent else message)
        if roles[-1:] != ["assistant"]:
            rest.append(None)
        return cls(given, rest)

    def ask(self) -> list[dict[str, Any]]:
        """The messages up to the next reply."""
        while (message := self.rest.popleft()) is not None:
            self.messages.append(message)
        return self.messages

    def answer(self, reply: Reply) -> bool:
        """Take a reply; whether it was the last."""
        self.messages.append({"role": "assistant", "content": reply.text})
        self.replies.append(reply)
        if None not in self.rest:
            self.messages += [message for message in self.rest if message is not None]
            return True
        return False

    @property
    def line(self) -> dict[str, Any]:
        unlearned = {i for i in self.given.silent if self.messages[i]["role"] == "assistant"}
        return {
            "messages": [m | {"loss": False} if i in unlearned else m for i, m in enumerate(self.messages)],
            **({} if self.given.tools is None else {"tools": self.given.tools}),
            "source": self.given.where,
            "token_ids": [reply.token_ids for reply in self.replies],
            "finish_reasons": [reply.stats["finish_reason"] for reply in self.replies],
        }


class _Queue:
    """Gives prompts as slots come free, those of conversations that have begun first, and takes replies."""

    def __init__(self, omni: Omni, conversations: Iterator[Conversation], settings: Settings, fatal: bool):
        self.omni, self.conversations, self.settings, self.fatal = omni, conversations, settings, fatal
        self.begun: deque[_Running] = deque()
        self.asked: dict[int, _Running] = {}
        self.left_out: list[str] = []

    def prompts(self) -> Iterator[Prompt | None]:
        """The next prompt; None while all depends on replies that are awaited."""
        number = 0
        while True:
            running = self.begun.popleft() if self.begun else self._new()
            if running is None:
                if not any(None in one.rest for one in self.asked.values()):
                    return
                yield None
                continue
            prompt = self._prompt(running)
            if prompt is not None:
                self.asked[number] = running
                number += 1
                yield prompt

    def record(self, number: int, reply: Reply) -> dict[str, Any] | None:
        """Take the reply to prompt `number`: the line of its conversation if that is complete."""
        running = self.asked.pop(number)
        if running.answer(reply):
            return running.line
        self.begun.append(running)
        return None

    def _new(self) -> _Running | None:
        given = next(self.conversations, None)
        return None if given is None else _Running.of(given)

    def _prompt(self, running: _Running) -> Prompt | None:
        most, where = self.settings.ending.max_new_tokens, running.given.where
        try:
            if None not in running.rest:
                raise InputError("no reply of the row is to be learned; leave it out, or state 'loss': true")
            preparation = {**vars(self.settings.preparation), "tools": running.given.tools}
            batch = self.omni.prepare(running.ask(), **preparation)
            check_context(batch.token_ids.shape[1], most, self.omni.config.thinker.text.max_position_embeddings)
        except OmniError as error:
            if self.fatal:
                raise InputError(f"{where}: {error}") from error
            self.left_out.append(f"{where}: {error}")
            print(f"left out: {where}: {error}", file=sys.stderr)
            return None
        # Whatever else is answered, and in whatever order.
        seed = zlib.crc32(f"{self.settings.seed} {where} {len(running.replies)}".encode())
        return Prompt(batch, seed & 0x7FFFFFFF, most)


class _Output:
    """The lines of an output; a context, in which the file is open. held: the sources that it held on entering."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about, self.held = path, json.loads(json.dumps(about)), set[str]()

    def __enter__(self) -> "_Output":
        beside = self.path.with_name(f"{self.path.name}.about.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                stated = read_object(beside, error=InputError, remedy="choose another output")
                if stated != self.about:
                    names = [name for name in {**stated, **self.about} if stated.get(name) != self.about.get(name)]
                    raise InputError(f"{self.path} holds replies of other {', '.join(names)}; choose another output")
            else:
                beside.write_text(json.dumps(self.about, indent=2, ensure_ascii=False) + "\n")
            self.file = self.path.open("a+b")
            self.file.seek(0)
            content = self.file.read()
            self.file.truncate(content.rfind(b"\n") + 1)
            self.held = {_source(line, self.path) for line in content.splitlines(keepends=True) if line.endswith(b"\n")}
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({reason_of(error)}); choose another output") from error
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def add(self, line: dict[str, Any]) -> None:
        """Append a line, which is safe on the disk on return."""
        try:
            text = json.dumps(line, ensure_ascii=False) + "\n"
            self.file.write(text.encode("utf-8", "backslashreplace"))
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({reason_of(error)}); {AGAIN}") from error


def _source(line: bytes, path: Path) -> str:
    row = parse_json(line, str(path), error=InputError)
    if not isinstance(row, dict) or not isinstance(row.get("source"), str):
        raise InputError(f"{path} holds a line without 'source', which was not written by this; choose another output")
    return row["source"]
