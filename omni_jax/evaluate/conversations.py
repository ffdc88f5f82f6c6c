"""Samples as conversations: the question, and further turns with the model's own answers in between.

Conversations run in slots, and each goes on as soon as its last answer is there. Where several run at once and an error
cannot be assigned to one of them, those under way are asked again one by one.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from omni_jax.decode.prompt import Prompt, check_context
from omni_jax.errors import MemoryLimitError
from omni_jax.evaluate.context import TaskContext, failure_of, result_of
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.metrics import METRICS, Scores
from omni_jax.evaluate.stored import Result
from omni_jax.omni import Messages, Reply

# The result of a sample, from its replies.
Scoring = Callable[[TaskContext, Sample, Sequence[Reply]], Result]


def reply_results(context: TaskContext, samples: Sequence[Sample]) -> Iterator[Result]:
    """The results of samples whose replies are compared with references."""
    yield from converse(context, samples, _compared)


def converse(context: TaskContext, samples: Sequence[Sample], scoring: Scoring) -> Iterator[Result]:
    """The results of samples, as they end."""
    conversations = [Conversation(sample, list(sample.messages)) for sample in samples]
    yield from _converse(context, conversations, scoring, context.slots)


def _compared(context: TaskContext, sample: Sample, replies: Sequence[Reply]) -> Result:
    """The result of a sample whose last reply is compared with its references."""
    scores: Scores = {}
    for name in context.settings.metrics:
        scores |= METRICS[name](replies[-1].text, sample.references)
    return result_of(sample, scores, replies)


@dataclass(eq=False)
class Conversation:
    """A sample that is being asked: the messages up to its next question, and the replies so far."""

    sample: Sample
    messages: Messages
    replies: list[Reply] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every turn has its reply."""
        return len(self.replies) > len(self.sample.turns)


class ConversationQueue:
    """Conversations as prompts: first questions in order, later turns as soon as the answers before them are there."""

    def __init__(self, context: TaskContext, conversations: Sequence[Conversation], scoring: Scoring):
        self.context, self.waiting, self.scoring = context, deque(conversations), scoring
        self._running: dict[int, Conversation] = {}
        self._failed: list[Result] = []

    def prompts(self) -> Iterator[Prompt | None]:
        """What to ask next, None while all depends on answers that are awaited."""
        number = 0
        while self.waiting or any(len(one.replies) < len(one.sample.turns) for one in self._running.values()):
            if not self.waiting:
                yield None
                continue
            conversation = self.waiting.popleft()
            try:
                prompt = self._prompt(conversation)
            except Exception as error:
                self._failed.append(failure_of(conversation.sample, error))
                continue
            self._running[number] = conversation
            number += 1
            yield prompt

    def record(self, number: int, reply: Reply) -> Result | None:
        """Add the reply to prompt `number`: the sample's result if it was the last."""
        conversation = self._running.pop(number)
        conversation.replies.append(reply)
        sample = conversation.sample
        if not conversation.done:
            question = sample.turns[len(conversation.replies) - 1]
            conversation.messages += [_message("assistant", reply.text), _message("user", question)]
            # Before new samples: what has begun should end.
            self.waiting.appendleft(conversation)
            return None
        try:
            return self.scoring(self.context, sample, conversation.replies)
        except Exception as error:
            return failure_of(sample, error)

    def take_failed(self) -> list[Result]:
        """Results of samples that could not be asked, each once."""
        failed, self._failed = self._failed, []
        return failed

    def take_running(self) -> list[Conversation]:
        """The conversations that were under way, which the queue gives up."""
        running, self._running = list(self._running.values()), {}
        return running

    def _prompt(self, conversation: Conversation) -> Prompt:
        context, most = self.context, self.context.request.ending.max_new_tokens
        batch = context.prepare(conversation.messages)
        check_context(batch.token_ids.shape[1], most, context.positions)
        return Prompt(batch, context.seed_of(conversation.sample), most)


def _converse(
    context: TaskContext, conversations: Sequence[Conversation], scoring: Scoring, slots: int
) -> Iterator[Result]:
    """The results of conversations, `slots` at a time; where that fails, those under way are asked one by one.

    Where memory does not hold a long one in each slot, half of the slots go on with all that are left.
    """
    queue = ConversationQueue(context, conversations, scoring)
    while queue.waiting:
        # Settings that are wrong for all are raised here.
        replies = _replies(context, queue.prompts(), slots)
        try:
            for number, reply in replies:
                result = queue.record(number, reply)
                yield from queue.take_failed()
                if result is not None:
                    yield result
        except Exception as error:
            running = queue.take_running()
            if isinstance(error, MemoryLimitError) and slots > 1:
                print(f"{error}; going on with {slots // 2} slots", file=sys.stderr)
                yield from queue.take_failed()
                yield from _converse(context, [*running, *queue.waiting], scoring, slots // 2)
                return
            if not running or context.must_raise(error):
                raise
            if len(conversations) == slots == 1:
                yield failure_of(running[0].sample, error)
            else:
                for conversation in running:
                    yield from _converse(context, [conversation], scoring, 1)
        yield from queue.take_failed()


def _replies(context: TaskContext, prompts: Iterator[Prompt | None], slots: int) -> Iterator[tuple[int, Reply]]:
    # All are stated, max_new_tokens too, so that slots which memory cannot hold are refused at the call.
    settings, speech = context.request.keywords(), context.settings.task == "speech"
    return context.omni.generate_many(prompts, slots=slots, speech=speech, drafter=context.drafter, **settings)


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}
