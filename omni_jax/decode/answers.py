"""Running sessions to their end, and what they have made as replies or as the events of a stream.

Session -> chunks of tokens -> text -> Reply, or Events as they come
   `-> SpeechSession -> frames of codes -> waveform -'
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

import numpy as np

from omni_jax.decode.reasoning import ReasoningSplitter
from omni_jax.decode.reply import Event, Reply, begins_inside_reasoning, logprobs_of, replies_of
from omni_jax.decode.session import Session
from omni_jax.decode.slots import Slots
from omni_jax.decode.speech.session import SpeechSession
from omni_jax.decode.speech.vocode import Vocoder
from omni_jax.decode.stops import StopStrings
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.models.code2wav import SAMPLES_PER_SECOND

# Tokens, and frames of speech, between two events of a stream.
STREAM_STEPS = 8
STREAM_FRAMES = 4

# Codes int32 [B, Q, F] and their lengths, to a waveform for each row.
Sound = Callable[[np.ndarray, list[int]], list[np.ndarray]]


def repeated(batch: Batch, times: int) -> Batch:
    """The batch with each row `times` times side by side; they read the same media."""
    names = ("token_ids", "mask", "rope_delta", "visual_index", "audio_index")
    rows = {name: np.repeat(getattr(batch, name), times, axis=0) for name in names}
    items = tuple(row for row in batch.items for _ in range(times))
    return replace(batch, position_ids=np.repeat(batch.position_ids, times, axis=1), items=items, **rows)


def written(session: Session, tokenizer: Tokenizer) -> list[Reply]:
    """The replies of a session, written to their end."""
    for _ in session.chunks():
        pass
    return _replies(session, tokenizer)


def spoken(session: Session, speaking: SpeechSession, sound: Sound, tokenizer: Tokenizer) -> list[Reply]:
    """The replies of a session, written and said to their end."""
    replies = written(session, tokenizer)
    for _ in speaking.chunks():
        pass
    start = perf_counter()
    lengths = [codes.shape[1] for codes in speaking.codes]
    padded = np.stack([np.pad(codes, ((0, 0), (0, max(lengths) - codes.shape[1]))) for codes in speaking.codes])
    waves = sound(padded, lengths)
    times = (speaking.seconds, perf_counter() - start)
    said = zip(replies, speaking.codes, waves, speaking.cut, strict=True)
    return [_with_speech(reply, codes, wave, cut, times) for reply, codes, wave, cut in said]


def finished(slots: Slots, tokenizer: Tokenizer) -> Iterator[tuple[int, Reply]]:
    """The number of each prompt, and its reply, as they end."""
    for taken in slots.finished():
        (reply,) = replies_of(taken.session, tokenizer, {"seconds": taken.seconds})
        yield taken.number, replace(reply, stats={**reply.stats, "finish_reason": "stop"}) if taken.ended else reply


def written_events(session: Session, tokenizer: Tokenizer) -> Iterator[Event]:
    """The events of a session of one row."""
    text = (session.stops or StopStrings(tokenizer, ())).watch()
    splitter = ReasoningSplitter(begins_inside_reasoning(session, 0, tokenizer))
    for (new,) in session.chunks(STREAM_STEPS):
        text.add(new)
        piece, logprobs = splitter.add(text.piece()), logprobs_of(session, 0, len(session.rows[0]) - len(new))
        yield Event(piece.text, new, logprobs=logprobs, reasoning=piece.reasoning)
    piece = splitter.add(text.last_piece(), last=True)
    yield Event(piece.text, [], _replies(session, tokenizer)[0], reasoning=piece.reasoning)


def spoken_events(session: Session, speaking: SpeechSession, vocoder: Vocoder, tokenizer: Tokenizer) -> Iterator[Event]:
    """The events of a session of one row that is also said."""
    waves, seconds = [np.zeros(0, np.float32)], 0.0
    for event in written_events(session, tokenizer):
        if event.reply is not None:
            wave, times = np.concatenate(waves), (speaking.seconds, seconds)
            yield replace(event, reply=_with_speech(event.reply, speaking.codes[0], wave, speaking.cut[0], times))
            return
        yield event
        for (codes,) in speaking.chunks(STREAM_FRAMES):
            start = perf_counter()
            waves.append(vocoder.add(codes))
            seconds += perf_counter() - start
            yield Event("", [], audio=waves[-1])


def _replies(session: Session, tokenizer: Tokenizer) -> list[Reply]:
    times = {"prefill_seconds": session.prefill_seconds, "decode_seconds": session.decode_seconds}
    return replies_of(session, tokenizer, times)


def _with_speech(reply: Reply, codes: np.ndarray, audio: np.ndarray, cut: bool, times: tuple[float, float]) -> Reply:
    """The reply with its speech; `times` are those of the Talker and of the vocoder."""
    stats = {
        "frames": codes.shape[1],
        "audio_seconds": len(audio) / SAMPLES_PER_SECOND,
        "speech_finish_reason": "length" if cut else "stop",
        "talker_seconds": times[0],
        "vocoder_seconds": times[1],
    }
    return replace(reply, stats={**reply.stats, **stats}, audio=audio, codes=codes)
