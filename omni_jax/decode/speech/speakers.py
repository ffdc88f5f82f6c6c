"""Rows that speak, each by itself: a fixed number of them, whatever texts they say and whenever they begin and end.

    request, text and hidden states -> prompt (NumPy) -> prefill, a row alone or all at once -> chunks of frames

The Talker says one text token per frame, so a row may run as far as its text is written: `Speakers.advance` makes the
frames that the texts so far allow, and those to the end for texts that are complete. A row whose text is not there yet
pauses. What a row says is the reply's spoken tokens (all but the last, which is the stop token or the one at the
limit), the mark of its end, then padding; the first of these is the last column of the prompt, frame t adds number
t + 1. No row depends on the others, and nothing compiles anew for another mixture of them.

Deliberate differences from transformers' `Qwen3OmniMoeForConditionalGeneration.generate`: each row of a batch says what
it says alone; a reply without a spoken token gives no audio instead of an error.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.decode.rows import idle, insert
from omni_jax.decode.speech.session import Voice
from omni_jax.decode.speech.talker_loop import (
    FRAMES,
    NO_CODE,
    SpeechState,
    TalkerPrompt,
    decode_frames,
    grow,
    prefill_talker,
)
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.speech import SpeechPrompt, speaker_ids, speech_prompt
from omni_jax.models.param import Declaration
from omni_jax.ops.cache import capacity_for
from omni_jax.sharding import place

# Folded into a row's key, so that speech does not draw with the numbers that text draws with.
SPEECH_KEY = 2**32 - 1


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
        """The reply's PRNG key, of no shape, the one that its text is drawn with."""
        ...


@dataclass(frozen=True, eq=False)
class SpeechRequest:
    """What is known before the first token is drawn, checked, in NumPy: the prompts of B rows and their limits.

    prompt: the first spoken token, its last column, is not known yet. budget: int32 [B], the most frames of each row.
    """

    prompt: SpeechPrompt
    budget: np.ndarray

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
        return cls(prompt, np.minimum(room, min(voice.max_frames, context)).astype(np.int32))

    @property
    def hears(self) -> bool:
        """Whether the prompts hold media, whose hidden states the Talker needs."""
        return bool((self.prompt.hidden_index >= 0).any())

    def begun(self, spoken: Sequence[list[int]]) -> "SpeechRequest":
        """The same with each row's first spoken token in place; a row without one makes no frames."""
        text_ids, last = self.prompt.text_ids.copy(), self.prompt.length - 1
        for row, ids, column in zip(text_ids, spoken, last.tolist(), strict=True):
            row[column] = ids[0] if ids else row[column]
        silent = np.asarray([not ids for ids in spoken])
        return SpeechRequest(replace(self.prompt, text_ids=text_ids), np.where(silent, 0, self.budget))


@dataclass(eq=False)
class Speaker:
    """One row that speaks.

    text: what it says. columns: of its prompt. budget: the most frames that it makes. seconds: what the steps took in
    which it took part. done: whether it has made its last frame. running: whether its prompt has run.
    """

    text: Text
    columns: int
    budget: int
    seconds: float = 0.0
    done: bool = False
    running: bool = False
    made: int = 0
    _parts: list[np.ndarray] = field(default_factory=list)

    @property
    def codes(self) -> np.ndarray:
        """The codes so far, int32 [Q, frames]."""
        return np.concatenate(self._parts, axis=1)

    @property
    def cut(self) -> bool:
        """Whether its limit of frames ended it, not it itself."""
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
        """Note the codes int32 [Q, n] of its next frames, and what the step took."""
        self._parts.append(codes)
        self.made += codes.shape[1]
        self.seconds += seconds


@dataclass(frozen=True, eq=False)
class _Waiting:
    """Rows from number `first` on that came together and whose prompt has not run; hidden [B, T, D] if they hear."""

    first: int
    request: SpeechRequest
    speakers: list[Speaker]
    hidden: jax.Array | None

    @property
    def ready(self) -> bool:
        return all(speaker.ready for speaker in self.speakers)


class Speakers:
    """A fixed number of rows that speak, numbered from 0.

        speakers = Speakers(params, declaration, embed, config, voice, rows=8)
        speaker = speakers.insert(b, request, text, hidden)    # one row into a place that is free
        new = speakers.advance()                               # new codes [Q, n] of each row, n = 0 for many
        speaker.done, speaker.codes, speaker.cut, speaker.seconds
        speakers.free(b)                                       # it is done, or no longer wanted

    `fill` gives all rows at once instead, whose prompts then run as one batch. Speakers and limits are each row's own;
    how codes are drawn is one for all.
    """

    def __init__(
        self,
        params: dict,
        declaration: Declaration,
        embed: Callable[[], jax.Array],
        config: OmniConfig,
        voice: Voice,
        rows: int,
    ):
        """Nothing is read or computed here.

        params, declaration: the Talker's. embed: gives the Thinker's token embeddings [V, D], on the Talker's devices.
        voice: how codes are drawn. rows: the number of rows, whole for the Talker's mesh.
        """
        assert config.talker is not None
        self.params, self.declaration, self.embed = params, declaration, embed
        self.config, self.talker = config, config.talker
        self.plan, self.values = voice.plan(config.talker), voice.values()
        self.rows: list[Speaker | None] = [None] * rows
        self.state: SpeechState | None = None
        self._waiting: list[_Waiting] = []

    @property
    def done(self) -> bool:
        """Whether no row has a frame to make, now or later."""
        return all(speaker is None or speaker.done for speaker in self.rows)

    def insert(self, b: int, request: SpeechRequest, text: Text, hidden: jax.Array | None = None) -> Speaker:
        """Have row `b`, which is free, say `text`.

        request: of one row. hidden [1, T, D]: the hidden states that the Thinker made of its prompt at the layer
        `accept_hidden_layer`; None without media. They are let go when the Talker's prompt has run.
        """
        (speaker,) = self._take(b, request, [text], hidden)
        return speaker

    def fill(self, request: SpeechRequest, texts: Sequence[Text], hidden: jax.Array | None = None) -> list[Speaker]:
        """Have all rows, which are free, say a text each; their prompts run as one batch.

        request: of all rows. hidden [B, T, D], as in `insert`.
        """
        assert len(texts) == len(self.rows)
        return self._take(0, request, texts, hidden)

    def free(self, b: int) -> None:
        """Give up row `b`, done or not, between two chunks; it can be taken again at once."""
        speaker, self.rows[b] = self.rows[b], None
        if speaker is None:
            return
        # On the device, a row that may make no frames stays what it is until another one takes its place.
        speaker.done = True
        self._waiting = [waiting for waiting in self._waiting if not all(s.done for s in waiting.speakers)]

    def advance(self, frames: int = FRAMES) -> list[np.ndarray]:
        """Make the frames that the texts allow now: the new codes of each row, int32 [Q, n].

        frames: the most frames of a row, at most FRAMES.
        """
        start = time.perf_counter()
        moved = self._run_prompts()
        count = np.asarray([min(frames, FRAMES, speaker.allowed if speaker else 0) for speaker in self.rows], np.int32)
        new = self._speak(count) if count.any() else [self._no_codes for _ in self.rows]
        seconds = time.perf_counter() - start
        for b, (speaker, codes) in enumerate(zip(self.rows, new, strict=True)):
            if speaker is not None and (count[b] or speaker in moved):
                speaker.add(codes, seconds)
        return new

    @property
    def _no_codes(self) -> np.ndarray:
        return np.empty((self.talker.num_code_groups, 0), np.int32)

    def _take(
        self, first: int, request: SpeechRequest, texts: Sequence[Text], hidden: jax.Array | None
    ) -> list[Speaker]:
        """New speakers for the rows from number `first` on."""
        given = zip(texts, request.prompt.length.tolist(), request.budget.tolist(), strict=True)
        speakers = [Speaker(text, columns, budget, _parts=[self._no_codes]) for text, columns, budget in given]
        # A row that was given up while it waited with others is free once they speak.
        waiting = [b for w in self._waiting for b in range(w.first, w.first + len(w.speakers))]
        rows = range(first, first + len(speakers))
        assert not any(self.rows[b] or b in waiting for b in rows), f"of the rows {list(rows)} some are taken"
        self.rows[first : first + len(speakers)] = speakers
        self._waiting.append(_Waiting(first, request, speakers, hidden if request.hears else None))
        return speakers

    def _run_prompts(self) -> list[Speaker]:
        """Run the prompts whose first spoken tokens are known: their speakers."""
        ready = [waiting for waiting in self._waiting if waiting.ready]
        self._waiting = [waiting for waiting in self._waiting if not waiting.ready]
        for waiting in ready:
            self._run_prompt(waiting)
        return [speaker for waiting in ready for speaker in waiting.speakers]

    def _run_prompt(self, waiting: _Waiting) -> None:
        # A speaker that was given up while it waited is silent.
        request = waiting.request.begun([[] if s.done else s.text.spoken for s in waiting.speakers])
        for speaker, budget in zip(waiting.speakers, request.budget.tolist(), strict=True):
            speaker.budget, speaker.running, speaker.done = budget, budget > 0, budget == 0
        if not request.budget.any():
            return
        prompt, mesh = _padded(request.prompt), self.declaration.mesh
        keys = _speech_keys(jnp.stack([speaker.text.key for speaker in waiting.speakers]))
        hidden = waiting.hidden
        state = prefill_talker(
            self.params,
            self.embed(),
            TalkerPrompt(prompt, request.budget, keys).placed(mesh),
            None if hidden is None else place(hidden, ("batch", None, None), mesh),
            self.values,
            declaration=self.declaration,
            plan=self.plan,
            capacity=capacity_for(prompt.text_ids.shape[1]),
        )
        self._put(waiting.first, state)

    def _put(self, first: int, state: SpeechState) -> None:
        """Take over the state of new rows: of all, or of one."""
        if state.cache.rows == len(self.rows):
            self.state = state
            return
        running = idle(state, rows=len(self.rows)) if self.state is None else self.state
        self.state = insert(self._grown(running, state.cache.capacity), state, np.int32(first))

    def _speak(self, count: np.ndarray) -> list[np.ndarray]:
        """Up to count[b] (int32 [B]) more frames of each row b, int32 [Q, n]."""
        assert self.state is not None
        most = max(s.columns + s.made + n for s, n in zip(self.rows, count.tolist(), strict=True) if s and n)
        made, self.state = decode_frames(
            self.params,
            self.embed(),
            self._grown(self.state, capacity_for(most)),
            self._text_ids(),
            count,
            self.values,
            declaration=self.declaration,
            plan=self.plan,
        )
        codes, done = jax.device_get((made.codes, made.done))
        for b, speaker in enumerate(self.rows):
            if speaker is not None and speaker.running:
                speaker.done = bool(done[b])
        return [row[:, row[0] != NO_CODE] for row in codes]

    def _text_ids(self) -> np.ndarray:
        """What the next frames say, int32 [B, FRAMES]."""
        ids = np.full((len(self.rows), FRAMES), self.config.tts_pad_token_id, np.int32)
        for row, speaker in zip(ids, self.rows, strict=True):
            if speaker is not None and speaker.running:
                begin = 1 + speaker.made
                said = [*speaker.text.spoken, self.config.tts_eos_token_id][begin : begin + FRAMES]
                row[: len(said)] = said
        return ids

    @staticmethod
    def _grown(state: SpeechState, capacity: int) -> SpeechState:
        return grow(state, capacity=capacity) if capacity > state.cache.capacity else state


@jax.jit
def _speech_keys(keys: jax.Array) -> jax.Array:
    """The keys that speech draws with, [B], of those that texts are drawn with."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, np.uint32(SPEECH_KEY))


def _padded(prompt: SpeechPrompt) -> SpeechPrompt:
    """The same prompt with a bucketed number of columns."""
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
