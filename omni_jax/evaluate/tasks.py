"""Tasks: from samples to results, one JSON object per sample, in the order in which they end.

`generate` asks the question and, where a sample has further turns, these too, with the model's own answers in between
(MT-Bench is this with FastChat's questions); `choice` compares the log-likelihoods of the choices; `loglikelihood` that
of the reference; `speech` speaks the answer, has it recognised, and compares what was heard with what was written.

A result holds id, category, scores and what was made; or an error in place of the latter, where a sample proves to be
unusable only when its turn has come. Whatever is raised while one sample is prepared or computed is that sample's
failure, so that no run ends at the same row again and again.
"""

from collections.abc import Callable, Iterator, Sequence

from omni_jax.decode.prompt import check_context
from omni_jax.evaluate.context import TaskContext, failure_of, result_of
from omni_jax.evaluate.conversations import reply_results
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.loglikelihood import Continuation, Scored, log_likelihoods, prepare_choices
from omni_jax.evaluate.metrics import Scores, choice_scores
from omni_jax.evaluate.spoken import speech_results
from omni_jax.evaluate.stored import Result


def choose_task(samples: Sequence[Sample]) -> str:
    """The task that the rows' fields ask for."""
    if all(sample.choices for sample in samples):
        return "choice"
    return "mt-bench" if all(sample.turns for sample in samples) else "generate"


def missing_field(sample: Sample, task: str, metrics: Sequence[str]) -> str | None:
    """What a sample lacks for a task, None if nothing."""
    if task == "choice" and (len(sample.choices) < 2 or sample.answer is None):
        return "the task 'choice' needs at least two 'choices' and the 'answer'"
    if task == "choice" and not all(sample.choices):
        return f"choice {sample.choices.index('')} is empty, and an empty text always has log-likelihood 0"
    if task == "loglikelihood" and not sample.references:
        return "the task 'loglikelihood' needs a 'reference'"
    if task == "loglikelihood" and not sample.references[0]:
        return "the 'reference' is empty, and an empty text always has log-likelihood 0"
    if task == "mt-bench" and not sample.turns:
        return "the task 'mt-bench' needs 'turns', two questions"
    if task in ("choice", "loglikelihood", "speech") and sample.turns:
        return f"the task {task!r} asks one question, the row has {1 + len(sample.turns)} turns"
    if task in ("generate", "mt-bench") and metrics and not sample.references:
        return f"the metric {metrics[0]!r} needs a 'reference'"
    return None


def results(context: TaskContext, samples: Sequence[Sample]) -> Iterator[Result]:
    """The result of every sample, as they end."""
    tasks: dict[str, Callable[[TaskContext, Sequence[Sample]], Iterator[Result]]] = {
        "generate": reply_results,
        "mt-bench": reply_results,
        "choice": _choice_results,
        "loglikelihood": _likelihood_results,
        "speech": speech_results,
    }
    return tasks[context.settings.task](context, samples)


def _choice_results(context: TaskContext, samples: Sequence[Sample]) -> Iterator[Result]:
    def result(sample: Sample, scored: list[Scored]) -> Result:
        assert sample.answer is not None
        likely, tokens = [one.log_likelihood for one in scored], [one.tokens for one in scored]
        scores = choice_scores(likely, tokens, sample.choices, sample.answer)
        return result_of(sample, scores) | {"log_likelihoods": likely, "answer": sample.answer}

    return _scored(context, samples, lambda sample: sample.choices, result)


def _likelihood_results(context: TaskContext, samples: Sequence[Sample]) -> Iterator[Result]:
    def result(sample: Sample, scored: list[Scored]) -> Result:
        (one,) = scored
        size = len(sample.references[0].encode())
        scores: Scores = {"log_likelihood": one.log_likelihood, "greedy": float(one.greedy)}
        return result_of(sample, scores | {"tokens": one.tokens, "bytes": size})

    return _scored(context, samples, lambda sample: sample.references[:1], result)


def _scored(
    context: TaskContext,
    samples: Sequence[Sample],
    texts: Callable[[Sample], Sequence[str]],
    result: Callable[[Sample, list[Scored]], Result],
) -> Iterator[Result]:
    """Results that follow from the log-likelihoods of texts after each sample's messages."""
    # Enough samples at once that texts of about one length meet, few enough that little is lost when a run is killed.
    for start in range(0, len(samples), 2 * context.slots):
        prepared: list[tuple[Sample, list[Continuation]]] = []
        for sample in samples[start : start + 2 * context.slots]:
            try:
                prepared.append((sample, _continuations(context, sample, texts(sample))))
            except Exception as error:
                yield failure_of(sample, error)
        for sample, scored in _score(context, prepared):
            yield failure_of(sample, scored) if isinstance(scored, Exception) else result(sample, scored)


def _score(
    context: TaskContext, prepared: Sequence[tuple[Sample, list[Continuation]]]
) -> Iterator[tuple[Sample, list[Scored] | Exception]]:
    """Samples with what their continuations score: all at once or, where that fails, one by one."""
    together = [one for _, several in prepared for one in several]
    try:
        scored = iter(log_likelihoods(context.omni, together, rows=context.slots))
    except Exception as error:
        if context.must_raise(error):
            raise
        if len(prepared) == 1:
            yield prepared[0][0], error
        else:
            for one in prepared:
                yield from _score(context, [one])
        return
    for sample, several in prepared:
        yield sample, [next(scored) for _ in several]


def _continuations(context: TaskContext, sample: Sample, texts: Sequence[str]) -> list[Continuation]:
    prompt = context.prepare(sample.messages)
    several = prepare_choices(context.omni, prompt, texts)
    longest = max(len(one.token_ids) for one in several)
    check_context(prompt.token_ids.shape[1], longest, context.positions)
    return several
