"""Rows that speak, each by itself: a fixed number of them, whatever texts they say and whenever they begin and end.

    request, text and hidden states -> prompt (NumPy) -> prefill, a row alone or all at once -> chunks of frames

`Speakers.advance` makes the frames that the texts so far allow, and those to the end for texts that are complete. A row
whose text is not there yet pauses. No row depends on the others, and nothing compiles anew for another mixture of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.decode.rows import idle, insert, noting_alike
from omni_jax.decode.speech.speaker import Speaker, SpeechRequest, Text
from omni_jax.decode.speech.talker_loop import (
    FRAMES,
    NO_CODE,
    SpeechState,
    TalkerPrompt,
    decode_frames,
    grow,
    prefill_talker,
)
from omni_jax.decode.speech.voice import Voices
from omni_jax.models.param import Declaration
from omni_jax.ops.cache import capacity_for
from omni_jax.settings import Voice
from omni_jax.sharding import place

# Folded into a row's key, so that speech does not draw with the numbers that text draws with.
SPEECH_KEY = 2**32 - 1


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

    `fill` gives all rows at once instead, whose prompts then run as one batch. Voices are each row's own; rows that
    draw codes in other ways than the call share one program that can draw in any way.
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
        voice: of the call; its speaker and limit are ignored. rows: their number, a multiple of what the mesh
        splits rows into.
        """
        assert config.talker is not None
        self.params, self.declaration, self.embed = params, declaration, embed
        self.config, self.talker = config, config.talker
        self.voices = Voices(voice, config.talker)
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

    def advance(self, frames: int = FRAMES, first: int = FRAMES) -> list[np.ndarray]:
        """Make the frames that the texts allow now: the new codes of each row, int32 [Q, n].

        frames: the most frames of a row, at most FRAMES. first: the most while a row has none that could have some;
        then at most as many again as that row has. So what begins need not wait for what others could make.
        """
        start = time.perf_counter()
        moved = self._run_prompts()
        allowed = [0 if speaker is None else speaker.allowed for speaker in self.rows]
        made = [speaker.made for speaker in self.rows if speaker is not None and speaker.allowed]
        most = min([frames, FRAMES, *(max(first, n) for n in made)])
        count = np.minimum(np.asarray(allowed, np.int32), most)
        new = self._speak(count) if count.any() else [self._no_codes for _ in self.rows]
        seconds = time.perf_counter() - start
        for b, (speaker, codes) in enumerate(zip(self.rows, new, strict=True)):
            if speaker is not None and (count[b] or speaker in moved):
                speaker.add(codes, seconds)
        return new

    @property
    def _no_codes(self) -> np.ndarray:
        """The codes of no frame, int32 [Q, 0]."""
        return np.empty((self.talker.num_code_groups, 0), np.int32)

    def _take(
        self, first: int, request: SpeechRequest, texts: Sequence[Text], hidden: jax.Array | None
    ) -> list[Speaker]:
        """New speakers for the rows from number `first` on."""
        given = zip(texts, request.prompt.length.tolist(), request.budget.tolist(), strict=True)
        speakers = [Speaker(text, columns, budget, self._no_codes, request.voice) for text, columns, budget in given]
        # A row that was given up while it waited with others is free once they speak.
        waiting = [b for w in self._waiting for b in range(w.first, w.first + len(w.speakers))]
        rows = range(first, first + len(speakers))
        assert not any(self.rows[b] or b in waiting for b in rows), f"of the rows {list(rows)} some are taken"
        self.rows[first : first + len(speakers)] = speakers
        self._waiting.append(_Waiting(first, request, speakers, hidden if request.has_media else None))
        return speakers

    def _run_prompts(self) -> list[Speaker]:
        """Run the prompts whose first spoken tokens are known: their speakers."""
        ready = [waiting for waiting in self._waiting if waiting.ready]
        self._waiting = [waiting for waiting in self._waiting if not waiting.ready]
        for waiting in ready:
            self._run_prompt(waiting)
        return [speaker for waiting in ready for speaker in waiting.speakers]

    def _run_prompt(self, waiting: _Waiting) -> None:
        """Run the prompt of rows that came together, unless all are silent."""
        # A speaker that was given up while it waited is silent.
        request = waiting.request.begun([[] if s.done else s.text.spoken for s in waiting.speakers])
        for speaker, budget in zip(waiting.speakers, request.budget.tolist(), strict=True):
            speaker.budget, speaker.running, speaker.done = budget, budget > 0, budget == 0
        if not request.budget.any():
            return
        prompt, mesh = request.padded(), self.declaration.mesh
        keys = _speech_keys(jnp.stack([speaker.text.key for speaker in waiting.speakers]))
        hidden = waiting.hidden
        plan, values = self.voices.of([speaker.voice for speaker in waiting.speakers])
        state = prefill_talker(
            self.params,
            self.embed(),
            TalkerPrompt(prompt, request.budget, keys).placed(mesh),
            None if hidden is None else place(hidden, ("batch", None, None), mesh),
            values,
            declaration=self.declaration,
            plan=plan,
            capacity=capacity_for(prompt.text_ids.shape[1]),
        )
        self._put(waiting.first, state)

    def _put(self, first: int, state: SpeechState) -> None:
        """Take over the state of new rows: of all, or of one."""
        if state.cache.rows == len(self.rows):
            self.state = state
            return
        running = self.state
        # While no other row speaks, caches may become short again.
        alone = not any(s and s.running and not s.done for b, s in enumerate(self.rows) if b != first)
        if running is None or alone and running.cache.capacity > state.cache.capacity:
            running = idle(state, rows=len(self.rows))
        running, row = noting_alike(grow(running, capacity=state.cache.capacity), state)
        self.state = insert(running, row, np.int32(first))

    def _speak(self, count: np.ndarray) -> list[np.ndarray]:
        """Up to count[b] (int32 [B]) more frames of each row b, int32 [Q, n]."""
        assert self.state is not None
        # A row that pauses also writes in every step, into the column after those that it keeps.
        kept = zip(self.rows, count.tolist(), strict=True)
        most = max(s.columns + min(s.made + n + 1, s.budget) for s, n in kept if s and s.running and not s.done)
        plan, values = self.voices.of([None if s is None else s.voice for s in self.rows])
        made, self.state = decode_frames(
            self.params,
            self.embed(),
            self.voices.fit(grow(self.state, capacity=capacity_for(most)), plan),
            self._text_ids(),
            count,
            values,
            declaration=self.declaration,
            plan=plan,
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


@jax.jit
def _speech_keys(keys: jax.Array) -> jax.Array:
    """The keys that speech draws with, [B], of those that texts are drawn with."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, np.uint32(SPEECH_KEY))
