"""Tasks: from samples to results, one JSON object a sample, in the order in which they end.

`generate` asks the question and, where a sample has further turns, these too, with the model's own answers in between
(MT-Bench is this with FastChat's questions); `choice` compares the log-likelihoods of the choices; `loglikelihood` that
of the reference; `speech` says the answer, has it recognised, and compares what was heard with what was written.

A result holds id, category, scores and what was made; or an error instead of the latter, where a sample proves to be
unusable only when its turn has come. Whatever is raised while one sample is prepared or computed is that sample's
failure, so that no run ends at the same row again and again. Where several run at once and none can be named, those
that were under way are asked again one by one.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax

from omni_jax.decode.prompt import Prompt, check_context
from omni_jax.errors import InputError
from omni_jax.evaluate.data import Sample, reason
from omni_jax.evaluate.loglikelihood import Continuation, Scored, log_likelihoods, prepare_choices
from omni_jax.evaluate.metrics import (
    METRICS,
    Recogniser,
    Scores,
    character_errors,
    choice_scores,
    recognise,
    word_errors,
)
from omni_jax.evaluate.processes import shares_model
from omni_jax.evaluate.settings import Settings
from omni_jax.evaluate.stored import Result
from omni_jax.inputs.batch import Batch
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Messages, Omni, Reply
from omni_jax.weights.drafters import Drafter

TASKS = ("generate", "choice", "loglikelihood", "speech", "mt-bench")


@dataclass(frozen=True, eq=False)
class Means:
    """What a task works with. slots: requests at once."""

    omni: Omni
    settings: Settings
    slots: int
    drafter: Drafter | None = None
    recogniser: Recogniser | None = None


def seed_of(seed: int, *what: str | int) -> int:
    """The seed of one sample of a run, for `Prompt`: the first 63 bits of SHA-256 of the run's seed and of `what`.

    So equal prompts draw each for themselves, and a sample draws alike whatever the samples beside it.
    """
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def choose_task(samples: Sequence[Sample]) -> str:
    """The task that the rows' fields ask for."""
    if all(sample.choices for sample in samples):
        return "choice"
    return "mt-bench" if all(sample.turns for sample in samples) else "generate"


def lacks(sample: Sample, task: str, metrics: Sequence[str]) -> str | None:
    """What a sample lacks for a task, if anything."""
    if task == "choice" and (len(sample.choices) < 2 or sample.answer is None):
        return "the task 'choice' needs at least two 'choices' and the 'answer'"
    if task == "choice" and not all(sample.choices):
        return f"choice {sample.choices.index('')} is empty, and nothing is always likely"
    if task == "loglikelihood" and not sample.references:
        return "the task 'loglikelihood' needs a 'reference'"
    if task == "loglikelihood" and not sample.references[0]:
        return "the 'reference' is empty, and nothing is always likely"
    if task == "mt-bench" and not sample.turns:
        return "the task 'mt-bench' needs 'turns', two questions"
    if task in ("choice", "loglikelihood", "speech") and sample.turns:
        return f"the task {task!r} asks one question, the row has {1 + len(sample.turns)} turns"
    if task in ("generate", "mt-bench") and metrics and not sample.references:
        return f"the metric {metrics[0]!r} needs a 'reference'"
    return None


def results(means: Means, samples: Sequence[Sample]) -> Iterator[Result]:
    """The result of every sample, as they end."""
    tasks: dict[str, Callable[[Means, Sequence[Sample]], Iterator[Result]]] = {
        "generate": _generated,
        "mt-bench": _generated,
        "choice": _chosen,
        "loglikelihood": _likely,
        "speech": _spoken,
    }
    return tasks[means.settings.task](means, samples)


@dataclass(eq=False)
class _Talk:
    """A conversation that is under way: what was said so far, and the replies."""

    sample: Sample
    messages: Messages
    replies: list[Reply]


class _Talks:
    """Samples as prompts: first questions in order, and later turns as soon as the answers before them are there."""

    def __init__(self, means: Means, talks: Sequence[_Talk]):
        self.means, self.waiting = means, deque(talks)
        self.under_way: dict[int, _Talk] = {}
        self.failed: list[Result] = []

    def prompts(self) -> Iterator[Prompt | None]:
        """What to ask next, None while all depends on answers that are awaited."""
        number = 0
        while self.waiting or any(len(talk.replies) < len(talk.sample.turns) for talk in self.under_way.values()):
            if not self.waiting:
                yield None
                continue
            talk = self.waiting.popleft()
            try:
                prompt = self._prompt(talk)
            except Exception as error:
                self.failed.append(_failure(talk.sample, error))
                continue
            self.under_way[number] = talk
            number += 1
            yield prompt

    def heard(self, number: int, reply: Reply) -> Result | None:
        """Take in a reply: the sample's result if it was the last."""
        talk = self.under_way.pop(number)
        talk.replies.append(reply)
        if len(talk.replies) <= len(talk.sample.turns):
            said = ({"role": "assistant", "content": reply.text}, _user(talk.sample.turns[len(talk.replies) - 1]))
            talk.messages += said
            # Before new samples: what has begun should end.
            self.waiting.appendleft(talk)
            return None
        scores: Scores = {}
        try:
            for name in self.means.settings.metrics:
                scores |= METRICS[name](reply.text, talk.sample.references)
        except Exception as error:
            return _failure(talk.sample, error)
        return _result(talk.sample, scores, talk.replies)

    def failures(self) -> list[Result]:
        """Results of samples that could not be asked, each once."""
        failed, self.failed = self.failed, []
        return failed

    def take_running(self) -> list[_Talk]:
        """Those that were under way, which are no more."""
        talks, self.under_way = list(self.under_way.values()), {}
        return talks

    def _prompt(self, talk: _Talk) -> Prompt:
        omni, settings = self.means.omni, self.means.settings
        batch = _prepared(self.means, talk.messages)
        limit = omni.config.thinker.text.max_position_embeddings
        check_context(batch.token_ids.shape[1], settings.max_new_tokens, limit)
        return Prompt(batch, seed_of(settings.seed, talk.sample.id), settings.max_new_tokens)


def _prepared(means: Means, messages: Messages) -> Batch:
    settings = means.settings
    return means.omni.prepare(
        messages,
        use_audio_in_video=settings.use_audio_in_video,
        fps=settings.fps,
        media=settings.media.options(),
        thinking=settings.thinking,
    )


def _generated(means: Means, samples: Sequence[Sample]) -> Iterator[Result]:
    yield from _answered(means, [_Talk(sample, list(sample.messages), []) for sample in samples], means.slots)


def _answered(means: Means, asked: Sequence[_Talk], slots: int) -> Iterator[Result]:
    """The results of conversations, `slots` at a time; where that fails, those under way are asked one by one."""
    talks = _Talks(means, asked)
    while talks.waiting:
        # Settings that are wrong for all are raised here.
        replies = _asked(means, talks.prompts(), slots)
        try:
            for number, reply in replies:
                result = talks.heard(number, reply)
                yield from talks.failures()
                if result is not None:
                    yield result
        except Exception as error:
            under_way = talks.take_running()
            if not under_way or _is_anothers(error, means):
                raise
            if len(asked) == slots == 1:
                yield _failure(under_way[0].sample, error)
            else:
                for talk in under_way:
                    yield from _answered(means, [talk], 1)
        yield from talks.failures()


def _asked(means: Means, prompts: Iterator[Prompt | None], slots: int) -> Iterator[tuple[int, Reply]]:
    settings = means.settings
    return means.omni.generate_many(
        prompts,
        slots=slots,
        stop=settings.stop,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        drafter=means.drafter,
        draft_tokens=settings.draft_tokens,
        draft_tree=settings.draft_tree,
        draft_sampling=settings.draft_sampling,
    )


def _chosen(means: Means, samples: Sequence[Sample]) -> Iterator[Result]:
    def score(sample: Sample, continuations: list[Continuation], scored: list) -> Result:
        assert sample.answer is not None
        likely, tokens = [one.log_likelihood for one in scored], [one.tokens for one in scored]
        scores = choice_scores(likely, tokens, sample.choices, sample.answer)
        return _result(sample, scores) | {"log_likelihoods": likely, "answer": sample.answer}

    return _scored(means, samples, lambda sample: sample.choices, score)


def _likely(means: Means, samples: Sequence[Sample]) -> Iterator[Result]:
    def score(sample: Sample, continuations: list[Continuation], scored: list) -> Result:
        (one,) = scored
        size = len(sample.references[0].encode())
        scores: Scores = {"log_likelihood": one.log_likelihood, "greedy": float(one.greedy)}
        return _result(sample, scores | {"tokens": one.tokens, "bytes": size})

    return _scored(means, samples, lambda sample: sample.references[:1], score)


def _scored(
    means: Means,
    samples: Sequence[Sample],
    texts: Callable[[Sample], Sequence[str]],
    result: Callable[[Sample, list[Continuation], list], Result],
) -> Iterator[Result]:
    """Results that follow from the log-likelihoods of texts after each sample's messages."""
    # Enough samples at once that texts of about one length meet, few enough that little is lost when a run is killed.
    for start in range(0, len(samples), 2 * means.slots):
        asked: list[tuple[Sample, list[Continuation]]] = []
        for sample in samples[start : start + 2 * means.slots]:
            try:
                asked.append((sample, _continuations(means, sample, texts(sample))))
            except Exception as error:
                yield _failure(sample, error)
        for sample, several, scored in _weighed(means, asked):
            yield _failure(sample, scored) if isinstance(scored, Exception) else result(sample, several, scored)


def _weighed(
    means: Means, asked: Sequence[tuple[Sample, list[Continuation]]]
) -> Iterator[tuple[Sample, list[Continuation], list[Scored] | Exception]]:
    """Samples with what their continuations score: all at once or, where that fails, one by one."""
    try:
        scored = iter(log_likelihoods(means.omni, [one for _, several in asked for one in several], rows=means.slots))
    except Exception as error:
        if _is_anothers(error, means):
            raise
        if len(asked) == 1:
            yield *asked[0], error
        else:
            for one in asked:
                yield from _weighed(means, [one])
        return
    for sample, several in asked:
        yield sample, several, [next(scored) for _ in several]


def _continuations(means: Means, sample: Sample, texts: Sequence[str]) -> list[Continuation]:
    omni, context = means.omni, _prepared(means, sample.messages)
    several = prepare_choices(omni, context, texts)
    longest, limit = max(len(one.token_ids) for one in several), omni.config.thinker.text.max_position_embeddings
    check_context(context.token_ids.shape[1], longest, limit)
    return several


def _spoken(means: Means, samples: Sequence[Sample]) -> Iterator[Result]:
    for sample in samples:
        try:
            yield _said(means, sample)
        except Exception as error:
            if _is_anothers(error, means):
                raise
            yield _failure(sample, error)


def _said(means: Means, sample: Sample) -> Result:
    assert means.recogniser is not None
    with _compilations() as compiled:
        reply = _say(means, sample)
    reply = replace(reply, stats={**reply.stats, "compiled": len(compiled)})
    assert reply.audio is not None
    heard = recognise(means.recogniser, reply.audio, SAMPLES_PER_SECOND) if len(reply.audio) else ""
    scores = word_errors(heard, [reply.text]) | character_errors(heard, [reply.text])
    return _result(sample, scores, [reply]) | {"heard": heard}


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """A list that grows by every program that is compiled inside the block."""
    compiled = []

    def hear(event: str, duration_secs: float, **more: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


def _say(means: Means, sample: Sample) -> Reply:
    settings = means.settings
    reply = means.omni.generate(
        sample.messages,
        max_new_tokens=settings.max_new_tokens,
        stop=settings.stop,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=seed_of(settings.seed, sample.id),
        use_audio_in_video=settings.use_audio_in_video,
        fps=settings.fps,
        media=settings.media.options(),
        thinking=settings.thinking,
        speech=True,
        speaker=settings.speaker,
        speech_temperature=settings.speech_temperature,
        max_frames=settings.max_frames,
        drafter=means.drafter,
        draft_tokens=settings.draft_tokens,
        draft_tree=settings.draft_tree,
        draft_sampling=settings.draft_sampling,
    )
    assert isinstance(reply, Reply)
    return reply


def _is_anothers(error: Exception, means: Means) -> bool:
    """Whether an error may be that of another process, of which this one cannot go on without."""
    return not isinstance(error, InputError) and shares_model(means.omni.params)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _result(sample: Sample, scores: Scores, replies: Sequence[Reply] = ()) -> Result:
    result = _named(sample) | {"scores": scores}
    if replies:
        result["turns"] = [{"text": r.text, "token_ids": r.token_ids, "stats": r.stats} for r in replies]
    return result


def _failure(sample: Sample, error: Exception) -> Result:
    return _named(sample) | {"scores": {}, "error": reason(error)}


def _named(sample: Sample) -> Result:
    media = {"media": sample.media} if sample.media else {}
    return {"id": sample.id, "category": sample.category, **media}
