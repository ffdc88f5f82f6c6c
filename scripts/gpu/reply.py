"""A whole spoken reply of this project, streamed, and of transformers; `scripts/bench/speech.py` defines its parts."""

import statistics
from collections.abc import Callable
from typing import Any

from scripts.bench import speech
from scripts.gpu.sizes import (
    FIRST_AUDIO,
    GOALS,
    SECOND_OF_SPEECH,
    WHOLE_REPLY,
    Sizes,
    parts_of_a_second,
    parts_of_first_audio,
)
from scripts.gpu.timing import Timing


def our_reply(sizes: Sizes) -> list[Timing]:
    """Ours, with the random weights of all three parts."""
    from scripts.bench.our_speech import Ours

    return reply_timings(sizes, Ours(sizes.speech(), None).repeat)


def reply_timings(sizes: Sizes, repeat: Callable[[], dict[str, float]]) -> list[Timing]:
    """First audio, a second of speech and the whole reply: medians of what `repeat` gives after one that compiles."""
    options: Any = sizes.speech()
    first, *rest = (repeat() for _ in range(1 + options.run.repetitions))
    medians = {part: statistics.median(seconds[part] for seconds in rest) for part in first}
    found = speech.figures(options, medians)
    figures = (
        (FIRST_AUDIO, found["time_to_first_audio"], first["first_audio"], parts_of_first_audio(sizes)),
        (SECOND_OF_SPEECH, found["speech_factor"], first["first_frame"], parts_of_a_second()),
        (WHOLE_REPLY, found["reply_seconds"], first["reply"], ()),
    )
    note = f"prompt {options.prompt}, {options.new} tokens, {options.frames} frames"
    return [
        Timing(name, 1e3 * seconds, once, goal=GOALS.get(name, ""), parts=parts, note=note)
        for name, seconds, once, parts in figures
    ]
