"""What a caller gets: a whole reply, and the events of a stream."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.decode.session import Session
from omni_jax.inputs.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer: its text, its token ids (the stop token included), its speech if that was asked for, and stats.

    audio: float32 [samples] at 24 kHz. codes: int32 [Q, frames].
    stats: prompt_tokens, new_tokens, finish_reason ("stop" or "length"), prefill_seconds and decode_seconds; with
    speech also frames, audio_seconds, speech_finish_reason, talker_seconds and vocoder_seconds; with a drafter also
    rounds, tokens_per_round (the target's own token of each round included), drafted and verified (tokens), and by
    round round_tokens, which it gave, and round_most, which it could give. The times are those of the whole batch, the
    first call's compilation included; in a stream, the Talker's hold the Thinker's work that it waited for. Of many
    replies that share slots there is one time instead: seconds, from when a slot took the prompt to its last token.
    """

    text: str
    token_ids: list[int]
    stats: dict[str, Any]
    audio: np.ndarray | None = None
    codes: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Event:
    """A step of a stream: a piece of text, never part of a character, and the token ids drawn since the last event.

    A piece may be empty while a character is incomplete. audio: the next piece of speech, float32 [samples] at 24 kHz,
    None in events without. The last event carries the whole reply.
    """

    text: str
    token_ids: list[int]
    reply: Reply | None = None
    audio: np.ndarray | None = None


def replies_of(session: Session, tokenizer: Tokenizer, times: dict[str, float]) -> list[Reply]:
    """The replies of a finished session, row by row; `times` go into the stats of each."""
    replies = []
    for length, ids, stopped in zip(session.lengths, session.rows, session.stopped, strict=True):
        stats = {
            "prompt_tokens": int(length),
            "new_tokens": len(ids),
            "finish_reason": "stop" if stopped else "length",
            **times,
            **session.row_stats(len(replies)),
        }
        replies.append(Reply(tokenizer.decode(ids), ids, stats))
    return replies
