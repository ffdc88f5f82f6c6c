"""Samples whose answers are spoken, recognised, and compared with what was written."""

from collections.abc import Iterator, Sequence

from omni_jax.evaluate.context import TaskContext, result_of
from omni_jax.evaluate.conversations import converse
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.metrics import character_errors, recognise, word_errors
from omni_jax.evaluate.stored import Result
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Reply


def speech_results(context: TaskContext, samples: Sequence[Sample]) -> Iterator[Result]:
    """The results of samples whose replies are spoken; the device goes on while one is recognised."""
    yield from converse(context, samples, _recognised)


def _recognised(context: TaskContext, sample: Sample, replies: Sequence[Reply]) -> Result:
    (reply,) = replies
    assert context.recogniser is not None and reply.audio is not None
    heard = recognise(context.recogniser, reply.audio, SAMPLES_PER_SECOND) if len(reply.audio) else ""
    scores = word_errors(heard, [reply.text]) | character_errors(heard, [reply.text])
    return result_of(sample, scores, replies) | {"heard": heard}
