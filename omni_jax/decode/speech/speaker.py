"""One row that speaks, as the host sees it: what it is asked to say, the text as it comes, and the codes so far.

The Talker says one text token per frame, so a row may run as far as its text is written. The Talker's inputs are the
reply's tokens except the last, an end mark, then padding. Input 0 is the prompt's last column; frame t adds input
t + 1.

Deliberate differences from transformers' `Qwen3OmniMoeForConditionalGeneration.generate`: each row of a batch says what
it says alone; a reply without a spoken token gives no audio instead of an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.speech import SpeechPrompt, speaker_ids, speech_prompt
from omni_jax.models.code2wav import SAMPLES_PER_SECOND
from omni_jax.settings import Voice


class Text(Protocol):
    """A reply as it is written, as far as speech has to know it."""

    @property
    def spoken(self) -> list[int]:
        """The token ids that speech says so far; never the last one of a finished reply."""
        ...

    @property
    def done(self) -> bool:
        """Whether the reply is finished, so that `spoken` stays what it is."""
        ...

    @property
    def key(self) -> jax.Array:
        """The reply's PRNG key [], the one that its text is drawn with."""
        ...


@dataclass(frozen=True, eq=False)
class SpeechRequest:
    """What is known before the first token is drawn, checked, in NumPy: the prompts of B rows and their limits.

    prompt: the first spoken token, its last column, is not known yet. budget: int32 [B], the most frames of each row.
    voice: of all rows.
    """

    prompt: SpeechPrompt
    budget: np.ndarray
    voice: Voice

    @classmethod
    def read(cls, batch: Batch, voice: Voice, config: OmniConfig) -> "SpeechRequest":
        """The request of a prepared batch and a voice; InputError if the Talker cannot hold its prompts."""
        assert config.talker is not None
        speakers = speaker_ids(voice.speaker, len(batch.mask), config)
        prompt = speech_prompt(batch, [config.tts_eos_token_id] * len(speakers), speakers, config)
        context = config.talker.text.max_position_embeddings
        room = context - prompt.length
        if room.min() < 1:
            raise InputError(
                f"the Talker's context of {context} does not hold a prompt of {int(prompt.length.max())} columns; "
                "shorten the conversation or its media, or leave out speech"
            )
        return cls(prompt, np.minimum(room, min(voice.max_frames, context)).astype(np.int32), voice)

    @property
    def has_media(self) -> bool:
        """Whether the prompts hold media, whose hidden states the Talker needs."""
        return bool((self.prompt.hidden_index >= 0).any())

    def begun(self, spoken: Sequence[list[int]]) -> "SpeechRequest":
        """The same with each row's first spoken token in place; a row without one makes no frames."""
        text_ids, last = self.prompt.text_ids.copy(), self.prompt.length - 1
        for row, ids, column in zip(text_ids, spoken, last.tolist(), strict=True):
            row[column] = ids[0] if ids else row[column]
        silent = np.asarray([not ids for ids in spoken])
        return replace(self, prompt=replace(self.prompt, text_ids=text_ids), budget=np.where(silent, 0, self.budget))

    def padded(self) -> SpeechPrompt:
        """The prompts with a bucketed number of columns."""
        prompt = self.prompt
        more = bucket(prompt.text_ids.shape[1]) - prompt.text_ids.shape[1]

        def pad(array: np.ndarray, fill: int) -> np.ndarray:
            return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)], constant_values=fill)

        return replace(
            prompt,
            text_ids=pad(prompt.text_ids, 0),
            hidden_index=pad(prompt.hidden_index, -1),
            codec_ids=pad(prompt.codec_ids, -1),
            position_ids=pad(prompt.position_ids, 0),
        )


@dataclass(eq=False)
class Speaker:
    """One row that speaks.

    text: what it says. columns: of its prompt. budget: the most frames that it makes. codes: those so far, int32 [Q,
    frames]. voice: how they are drawn. seconds: of the steps in which it took part. running: whether its prompt has
    run. done: whether it has made its last frame, or was given up.
    """

    text: Text
    columns: int
    budget: int
    codes: np.ndarray
    voice: Voice
    seconds: float = 0.0
    running: bool = False
    done: bool = False

    @property
    def made(self) -> int:
        """The number of frames so far."""
        return self.codes.shape[1]

    @property
    def cut(self) -> bool:
        """Whether it ended at its limit of frames, not by itself."""
        return 0 < self.budget <= self.made

    @property
    def ready(self) -> bool:
        """Whether its prompt may run: its first token is known, or it is known to have none."""
        return self.done or self.text.done or bool(self.text.spoken)

    @property
    def allowed(self) -> int:
        """The number of frames that it may make now."""
        if self.done or not self.running:
            return 0
        left = self.budget - self.made
        return left if self.text.done else max(0, min(left, len(self.text.spoken) - 1 - self.made))

    def add(self, codes: np.ndarray, seconds: float) -> None:
        """Note the codes int32 [Q, n] of its next frames, and the seconds of the step."""
        self.codes = np.concatenate([self.codes, codes], axis=1)
        self.seconds += seconds

    def stats(self, wave: np.ndarray) -> dict[str, Any]:
        """What the stats of a reply report of its speech; wave: its sound, float32 [samples]."""
        return {
            "frames": self.made,
            "audio_seconds": len(wave) / SAMPLES_PER_SECOND,
            "speech_finish_reason": "length" if self.cut else "stop",
            "talker_seconds": self.seconds,
        }
