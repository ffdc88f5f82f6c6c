"""What a caller gets: a whole reply, and the events of a stream."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.models.code2wav import SAMPLES_PER_SECOND

# Letters of a text that a reply prints.
SHOWN_LETTERS = 60


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log-probabilities of n tokens by the model's own distribution: before penalty, temperature and filters.

    token: float32 [n], those of the tokens. top_ids int32 [n, k] and top float32 [n, k]: the k likeliest tokens in the
    place of each and their log-probabilities, the likeliest first.
    """

    token: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Reply:
    """An answer: its text, its token ids (the stop token included), its speech if there is any, and stats.

    With a stop string the text ends before it, and the token ids end with the token that completes it. text: the
    answer. reasoning: what a thinking model wrote before it, between <think> and </think>; None without. A reply that
    ends while it still thinks has no answer. The token ids are those of both. audio: float32 [samples] at 24 kHz.
    codes: int32 [Q, frames]. logprobs: of the token ids, if they were wanted. stats: prompt_tokens, new_tokens,
    finish_reason ("stop", "length", or "cancelled"), prefill_seconds and decode_seconds; if stop strings were given
    also stop_string, the one that ended it or None; with speech also frames, audio_seconds, speech_finish_reason,
    talker_seconds and vocoder_seconds; with a drafter also rounds, tokens_per_round (the target's own token of each
    round included), drafted and verified (tokens), and by round round_tokens, which it gave, and round_most, which it
    could give; where conversations are kept also cached_tokens, of the prompt, which did not run again. The times are
    those of the whole batch, the first call's compilation included; in a stream, the Talker's hold the Thinker's work
    that it waited for. Replies that share slots have other times instead: seconds, from when a slot took the prompt to
    its last token; share_seconds, of the time that all replies took together; and compiled, the number of programs that
    were compiled meanwhile.
    """

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    audio: np.ndarray | None = None
    codes: np.ndarray | None = None
    logprobs: Logprobs | None = None
    reasoning: str | None = None

    def __repr__(self) -> str:
        sound = "" if self.audio is None else f", {self.audio.size / SAMPLES_PER_SECOND:.1f} s of speech"
        return f"Reply({_begin(self.text)}, {len(self.token_ids)} tokens{sound})"


@dataclass(frozen=True, eq=False, repr=False)
class Event:
    """A step of a stream: a piece of text, never part of a character, and the token ids drawn since the last event.

    A piece may be empty while a character is incomplete, or while the text may be the beginning of a stop string.
    audio: the next piece of speech, float32 [samples] at 24 kHz, None in events without. logprobs: of the token ids, if
    they were wanted and there are any. reasoning: the next piece of what a thinking model writes before its answer; the
    text has none of it. The last event carries the whole reply.
    """

    text: str
    token_ids: list[int]
    reply: Reply | None = None
    audio: np.ndarray | None = None
    logprobs: Logprobs | None = None
    reasoning: str = ""

    def __repr__(self) -> str:
        sound = "" if self.audio is None else f", {self.audio.size / SAMPLES_PER_SECOND:.1f} s of speech"
        reply = "" if self.reply is None else f", {self.reply}"
        return f"Event({_begin(self.text)}, {len(self.token_ids)} tokens{sound}{reply})"


def _begin(text: str) -> str:
    """The beginning of a text, on one line."""
    return repr(text if len(text) <= SHOWN_LETTERS else text[: SHOWN_LETTERS - 3] + "...")
