"""What a caller gets: a whole reply, and the events of a stream."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.decode.reasoning import ends_inside_reasoning, split_reasoning
from omni_jax.decode.session import Session
from omni_jax.inputs.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Logprobs:
    """Log-probabilities of n tokens by the model's own distribution: before penalty, temperature and filters.

    token: float32 [n], those of the tokens. top_ids int32 [n, k] and top float32 [n, k]: the k likeliest tokens in the
    place of each and their log-probabilities, the likeliest first.
    """

    token: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclass(frozen=True, eq=False)
class Reply:
    """An answer: its text, its token ids (the stop token included), its speech if that was asked for, and stats.

    With a stop string the text ends before it, and the token ids end with the token that completes it.
    text: the answer; reasoning: what a thinking model wrote before it, between <think> and </think>, None without; a
    reply that ends while it still thinks has no answer. The token ids are those of both.
    audio: float32 [samples] at 24 kHz. codes: int32 [Q, frames]. logprobs: of the token ids, if asked for.
    stats: prompt_tokens, new_tokens, finish_reason ("stop" or "length"), prefill_seconds and decode_seconds; if stop
    strings were given also stop_string, the one that ended it or None; with speech also frames, audio_seconds,
    speech_finish_reason, talker_seconds and vocoder_seconds; with a drafter also
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
    logprobs: Logprobs | None = None
    reasoning: str | None = None


@dataclass(frozen=True, eq=False)
class Event:
    """A step of a stream: a piece of text, never part of a character, and the token ids drawn since the last event.

    A piece may be empty while a character is incomplete, or while the text may be the beginning of a stop string.
    audio: the next piece of speech, float32 [samples] at 24 kHz, None in events without. logprobs: of the token ids, if
    asked for and there are any. reasoning: the next piece of what a thinking model writes before its answer; the text
    has none of it. The last event carries the whole reply.
    """

    text: str
    token_ids: list[int]
    reply: Reply | None = None
    audio: np.ndarray | None = None
    logprobs: Logprobs | None = None
    reasoning: str = ""


def replies_of(session: Session, tokenizer: Tokenizer, times: dict[str, float]) -> list[Reply]:
    """The replies of a finished session, row by row; `times` go into the stats of each."""
    replies = []
    for row, (length, ids, stopped) in enumerate(zip(session.lengths, session.rows, session.stopped, strict=True)):
        stats = {
            "prompt_tokens": int(length),
            "new_tokens": len(ids),
            "finish_reason": "stop" if stopped else "length",
            **({"stop_string": session.met[row]} if session.watches else {}),
            **times,
            **session.row_stats(row),
        }
        text = session.watches[row].text() if session.watches else tokenizer.decode(ids)
        text, reasoning = split_reasoning(text, begins_inside_reasoning(session, row, tokenizer))
        replies.append(Reply(text, ids, stats, logprobs=logprobs_of(session, row), reasoning=reasoning))
    return replies


def begins_inside_reasoning(session: Session, row: int, tokenizer: Tokenizer) -> bool:
    """Whether the prompt of a row has opened its reasoning."""
    batch, prompt = session.batch, row // session.copies
    return ends_inside_reasoning(batch.token_ids[prompt][batch.mask[prompt]], tokenizer)


def logprobs_of(session: Session, row: int, since: int = 0) -> Logprobs | None:
    """The log-probabilities of a row's tokens from number `since` on; None if nobody asked."""
    if session.logprobs is None:
        return None
    reports = session.reports(row, since)
    floats, most = reports.view(np.float32), reports.shape[1] // 2 - 1
    k = min(session.logprobs, most)
    token, top = floats[:, 1].copy(), floats[:, 2 + most : 2 + most + k].copy()
    return Logprobs(token, reports[:, 2 : 2 + k].copy(), top)
