"""A text that is known before it is said: exact text to speech, without any reply being drawn.

The Talker reads embeddings of the assistant's words and, at media of the prompt only, what the Thinker made of them. So
a text takes the place of the words of a reply, after a prompt without media, and the Thinker does not run at all. The
codes are those of a reply of these tokens to this prompt with the same seed.

    text -> Words -.
    prompt --------+-> Said -> Speakers -> Speaker (codes) -> vocoder -> Reply
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.decode.limits import seeds_of
from omni_jax.decode.prompt import has_media
from omni_jax.decode.reply import Reply
from omni_jax.decode.request import row_keys
from omni_jax.decode.speech.speaker import Speaker, SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.decode.speech.voice import check_voice
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.settings import Voice

# What a text answers, unless a caller says so: speech of this model is always an answer.
READ_ALOUD: list[dict[str, Any]] = [{"role": "user", "content": "Please read the text aloud."}]
VOICE = Voice()


@dataclass(frozen=True, eq=False)
class Words:
    """A text as `Speakers` says it. spoken: its token ids, at least one. seed: of the draws."""

    spoken: list[int]
    seed: int
    done: bool = True

    @property
    def key(self) -> jax.Array:
        """The random key of the seed, a typed key []."""
        return row_keys([self.seed], 1)[0]


@dataclass(frozen=True, eq=False)
class Said:
    """A text to say, with what is known of the prompt that it answers."""

    text: str
    words: Words
    request: SpeechRequest

    @classmethod
    def read(cls, text: Any, seed: Any, batch: Batch, voice: Voice, config: OmniConfig, tokenizer: Tokenizer) -> "Said":
        """A text that answers a prepared prompt of one row; literals of control tokens in it are ordinary text.

        Raises InputError for a text without words, a prompt with media, and a voice that the model does not have.
        """
        (seed,) = seeds_of(seed, 1)
        check_voice(voice, 1, config)
        if not isinstance(text, str):
            raise InputError(f"the text is of type {type(text).__name__}; give a string")
        if has_media(batch):
            raise InputError("the messages that a text answers hold media; leave them out")
        ids = tokenizer.encode_plain(text)
        if not ids:
            raise InputError("the text is empty; give words to say")
        return cls(text, Words(ids, seed), SpeechRequest.read(batch, voice, config))

    def say(self, speakers: Speakers) -> Speaker:
        """Say it, in the first row of `speakers`, which is free."""
        speaker = speakers.insert(0, self.request, self.words)
        while not speaker.done:
            speakers.advance()
        return speaker

    def reply(self, speaker: Speaker, wave: np.ndarray) -> Reply:
        """What was said as a reply without drawn tokens; wave: float32 [samples]."""
        stats = {"new_tokens": 0, "finish_reason": "stop", **speaker.stats(wave)}
        return Reply(self.text, self.words.spoken, stats, audio=wave, codes=speaker.codes)
