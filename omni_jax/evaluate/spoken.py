"""Samples whose answers are spoken, recognised, and compared with what was written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax

from omni_jax.evaluate.context import TaskContext, failure_of, result_of
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.metrics import character_errors, recognise, word_errors
from omni_jax.evaluate.stored import Result
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Reply


def speech_results(context: TaskContext, samples: Sequence[Sample]) -> Iterator[Result]:
    """The results of samples whose replies are spoken."""
    for sample in samples:
        try:
            yield _speech_result(context, sample)
        except Exception as error:
            if context.must_raise(error):
                raise
            yield failure_of(sample, error)


def _speech_result(context: TaskContext, sample: Sample) -> Result:
    assert context.recogniser is not None
    with _compilations() as compiled:
        reply = _speak(context, sample)
    reply = replace(reply, stats={**reply.stats, "compiled": len(compiled)})
    assert reply.audio is not None
    heard = recognise(context.recogniser, reply.audio, SAMPLES_PER_SECOND) if len(reply.audio) else ""
    scores = word_errors(heard, [reply.text]) | character_errors(heard, [reply.text])
    return result_of(sample, scores, [reply]) | {"heard": heard}


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """A list that grows by every program that is compiled inside the block."""
    compiled = []

    def listener(event: str, duration_secs: float, **more: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def _speak(context: TaskContext, sample: Sample) -> Reply:
    settings: dict[str, Any] = {**context.request.keywords(), "seed": context.seed_of(sample)}
    reply = context.omni.generate(sample.messages, speech=True, drafter=context.drafter, **settings)
    assert isinstance(reply, Reply)
    return reply
