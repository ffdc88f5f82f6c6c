"""Running sessions to their end, and what they have made as replies or as the events of a stream.

Session -> chunks of tokens -> text -> Reply, or Events as they come
   `-> Speakers -> frames of codes -> waveform -'
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter

import jax
import numpy as np

from omni_jax.decode.reply import Event, Reply, logprobs_of, replies_of
from omni_jax.decode.session import Session
from omni_jax.decode.slots import Slots
from omni_jax.decode.speech.speaker import Speaker, SpeechRequest
from omni_jax.decode.speech.speakers import Speakers
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


@dataclass(frozen=True, eq=False)
class Writing:
    """Row `row` of a session, as speech reads it."""

    session: Session
    row: int

    @property
    def spoken(self) -> list[int]:
        return self.session.spoken[self.row]

    @property
    def done(self) -> bool:
        return self.session.row_done[self.row]

    @property
    def key(self) -> jax.Array:
        return self.session.keys[self.row]


@dataclass(frozen=True, eq=False)
class Aloud:
    """What says the rows of a session."""

    speakers: Speakers
    request: SpeechRequest

    def begin(self, session: Session) -> list[Speaker]:
        """Have all rows said, after the session's prompts have run."""
        layer = self.speakers.talker.accept_hidden_layer
        hidden = session.give_tapped(layer) if self.request.hears else None
        return self.speakers.fill(self.request, [Writing(session, b) for b in range(len(session.rows))], hidden)


def spoken(session: Session, aloud: Aloud, sound: Sound, tokenizer: Tokenizer) -> list[Reply]:
    """The replies of a session, written and said to their end."""
    replies, speakers = written(session, tokenizer), aloud.begin(session)
    while not aloud.speakers.done:
        aloud.speakers.advance()
    start = perf_counter()
    lengths = [speaker.made for speaker in speakers]
    padded = np.stack([np.pad(s.codes, ((0, 0), (0, max(lengths) - s.made))) for s in speakers])
    waves = sound(padded, lengths)
    seconds = perf_counter() - start
    said = zip(replies, speakers, waves, strict=True)
    return [_with_speech(reply, speaker, wave, seconds) for reply, speaker, wave in said]


def finished(slots: Slots, tokenizer: Tokenizer) -> Iterator[tuple[int, Reply]]:
    """The number of each prompt, and its reply, as they end."""
    for taken in slots.finished():
        (reply,) = replies_of(taken.session, tokenizer, {"seconds": taken.seconds})
        yield taken.number, replace(reply, stats={**reply.stats, "finish_reason": "stop"}) if taken.ended else reply


def written_events(session: Session, tokenizer: Tokenizer) -> Iterator[Event]:
    """The events of a session of one row."""
    text = (session.stops or StopStrings(tokenizer, ())).watch()
    for (new,) in session.chunks(STREAM_STEPS):
        text.add(new)
        yield Event(text.piece(), new, logprobs=logprobs_of(session, 0, len(session.rows[0]) - len(new)))
    yield Event(text.last_piece(), [], _replies(session, tokenizer)[0])


def spoken_events(session: Session, aloud: Aloud, vocoder: Vocoder, tokenizer: Tokenizer) -> Iterator[Event]:
    """The events of a session of one row that is also said."""
    waves, seconds, speaker = [np.zeros(0, np.float32)], 0.0, None
    for event in written_events(session, tokenizer):
        if event.reply is not None and speaker is not None:
            yield replace(event, reply=_with_speech(event.reply, speaker, np.concatenate(waves), seconds))
            return
        yield event
        if speaker is None:
            (speaker,) = aloud.begin(session)
        while (codes := aloud.speakers.advance(STREAM_FRAMES)[0]).shape[1]:
            start = perf_counter()
            waves.append(vocoder.add(codes))
            seconds += perf_counter() - start
            yield Event("", [], audio=waves[-1])


def _replies(session: Session, tokenizer: Tokenizer) -> list[Reply]:
    times = {"prefill_seconds": session.prefill_seconds, "decode_seconds": session.decode_seconds}
    return replies_of(session, tokenizer, times)


def _with_speech(reply: Reply, speaker: Speaker, audio: np.ndarray, vocoder_seconds: float) -> Reply:
    """The reply with its speech, float32 [samples]."""
    stats = {
        "frames": speaker.made,
        "audio_seconds": len(audio) / SAMPLES_PER_SECOND,
        "speech_finish_reason": "length" if speaker.cut else "stop",
        "talker_seconds": speaker.seconds,
        "vocoder_seconds": vocoder_seconds,
    }
    return replace(reply, stats={**reply.stats, **stats}, audio=audio, codes=speaker.codes)
