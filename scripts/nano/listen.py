"""How well the Talker says sentences that it was not trained on: its codes, its lengths, and how near its sound is.

Two measures. `held_accuracy` gives the Talker the true codes so far and counts how often the next is likeliest.
`listen` lets it speak alone and compares with the sentence's codes: how many frames it makes, whether it ends by
itself, and the mean difference of log-mels from what Code2Wav makes of these codes, beside that of another sentence.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import omni_jax
from omni_jax.decode.speech.speaker import SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.vocode import vocode
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.omni import Omni
from omni_jax.settings import Voice
from omni_jax.train.talker import TalkerSft
from scripts.nano.codec import log_mel

# Frames after which a sentence is given up.
MOST = 150


@dataclass(frozen=True)
class Sentence:
    """A text that is known as a whole, as `decode.speech.speaker.Text` states it."""

    spoken: list[int]
    key: jax.Array
    done: bool = True


@dataclass(frozen=True)
class Heard:
    """frames: made, and right. ended: whether by itself. distance: of log-mels; other: from another sentence's."""

    frames: tuple[int, int]
    ended: bool
    distance: float
    other: float


def held_accuracy(recipe: TalkerSft, model: Path) -> dict[str, float]:
    """The means of the recipe's metrics over its rows, taken once, for the Talker of `model`."""
    omni = omni_jax.load(model, parts=TalkerSft.PARTS)
    objective = recipe.objective(omni)
    batches: Any = recipe.batches(omni)
    loss, sums, weight = jax.jit(objective.loss), {}, 0.0
    try:
        for step in batches:
            found = loss(objective.params, objective.frozen, step.batch)
            weight += float(found.weight)
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.metrics.items()}
    finally:
        batches.close()
    return {name: value / weight for name, value in sums.items()}


def listen(omni: Omni, rows: Sequence[dict[str, Any]], voice: Voice) -> list[Heard]:
    """What comes of rows without media, which hold their codes, when the Talker says them alone."""
    true = [np.array(row["codes"], np.int32) for row in rows]
    made = speak(omni, rows, voice)
    waves = [_sound(omni, codes) for codes in true]
    heard = []
    for i, (speaker, codes) in enumerate(zip(made, true, strict=True)):
        sound = _sound(omni, speaker.codes)
        distances = mel_distance(sound, waves[i]), mel_distance(sound, waves[i - 1])
        heard.append(Heard((speaker.made, codes.shape[1]), not speaker.cut, *distances))
    return heard


def speak(omni: Omni, rows: Sequence[dict[str, Any]], voice: Voice) -> list[Any]:
    """The Talker's `Speaker` of each row, done: it says the last message, in the voice that the row names."""
    batch, encode = omni.prepare([row["messages"][:-1] for row in rows]), omni.processor.tokenizer.encode_plain
    named = Voice(**{**vars(voice), "speaker": [row["speaker"] for row in rows], "max_frames": MOST})
    thinker, talker = omni.params["thinker"], omni.params["talker"]
    speakers = Speakers(
        talker, omni.declarations["talker"], lambda: thinker["embed"], omni.config, named, rows=len(rows)
    )
    texts = [Sentence(encode(row["messages"][-1]["content"]), jax.random.key(i)) for i, row in enumerate(rows)]
    made = speakers.fill(SpeechRequest.read(batch, named, omni.config), texts)
    while not speakers.done:
        speakers.advance()
    return made


def mel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The mean difference of the log-mels of two waves [n], over the time that both have; infinite for none."""
    n = min(len(a), len(b))
    if n < SAMPLES_PER_SECOND // 10:
        return float("inf")
    one, other = (log_mel(jnp.asarray(wave[None, :n])) for wave in (a, b))
    return float(jnp.mean(jnp.abs(one - other)))


def _sound(omni: Omni, codes: np.ndarray) -> np.ndarray:
    config = omni.config.code2wav
    assert config is not None
    return vocode(omni.params["code2wav"], omni.declarations["code2wav"], config, codes[None])[0]


def read_repeats(file: Path, count: int) -> list[dict[str, Any]]:
    """At most `count` rows of a file without media, one of each sentence and speaker, spread over all of it."""
    rows = map(json.loads, reversed(file.read_text().splitlines()))
    chosen = [*{(row["speaker"], row["messages"][-1]["content"]): row for row in rows}.values()][::-1]
    return chosen[:: max(1, len(chosen) // count)][:count]
