"""One spoken reply as the host sees it: from the Thinker's tokens to frames of codes, in chunks.

The Talker says one text token a frame, so it may run as far as the Thinker has written: `chunks` makes the frames that
the text drawn so far allows, and those to the end once the reply is complete. The stream of text is the reply's spoken
tokens (all but the last, which is the stop token or the one at the limit), the mark of its end, then padding; the first
of it stands in the prompt, frame t adds number t + 1.

Deliberate differences from transformers' `Qwen3OmniMoeForConditionalGeneration.generate`: each row of a batch has this
stream by itself, as it has alone; a reply without a spoken token gives no audio instead of an error.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.decode.sampling import Sampling
from omni_jax.decode.session import Session
from omni_jax.decode.speech.talker_loop import (
    SpeechPlan,
    SpeechState,
    TalkerPrompt,
    decode_frames,
    grow,
    prefill_talker,
)
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch, bucket
from omni_jax.inputs.speech import SpeechPrompt, speaker_ids, speech_prompt
from omni_jax.inputs.values import listed, shown, whole
from omni_jax.models.param import Declaration
from omni_jax.ops.cache import capacity_for
from omni_jax.sharding import place

FRAMES = 32
# The longest speech unless told: five and a half minutes.
MAX_FRAMES = 4096
# How the reference draws the codes behind the first when it samples.
RESIDUAL = Sampling(temperature=1.0, top_k=50, top_p=0.8)
# Folded into a row's key, so that speech does not draw with the numbers that text draws with.
SPEECH_KEY = 2**32 - 1


@dataclass(frozen=True)
class Voice:
    """Who speaks, how first codes are drawn (the codes behind them greedily or as `RESIDUAL`), and for how long."""

    speaker: str | Sequence[str]
    sampling: Sampling
    max_frames: int

    def __post_init__(self) -> None:
        frames = whole("max_frames", self.max_frames, "it must be a whole number of at least 1")
        object.__setattr__(self, "max_frames", frames)
        if not isinstance(self.speaker, str):
            listed("speaker", self.speaker, "give a name, or one for each conversation")

    def check(self, rows: int, config: OmniConfig) -> None:
        """Raise InputError for speakers that the model lacks, and for more frames than its Talker can ever make."""
        speaker_ids(self.speaker, rows, config)
        context = config.talker.text.max_position_embeddings if config.talker else 0
        if self.max_frames > (most := max(MAX_FRAMES, context)):
            given = shown(self.max_frames)
            raise InputError(f"max_frames is {given}, but the Talker's context ends at {context}; give at most {most}")

    def repeated(self, times: int) -> "Voice":
        """The voice of rows each of which comes `times` times side by side."""
        if isinstance(self.speaker, str):
            return self
        return replace(self, speaker=[name for name in self.speaker for _ in range(times)])

    def plan(self, config: TalkerConfig) -> SpeechPlan:
        """The static part."""
        residual = self._residual().plan(config.code_predictor.vocab_size)
        return SpeechPlan(self.sampling.plan(config.text.vocab_size), residual)

    def values(self) -> tuple[dict, dict]:
        """The traced part."""
        return self.sampling.values(), self._residual().values()

    def _residual(self) -> Sampling:
        return RESIDUAL if self.sampling.temperature else Sampling()


class SpeechSession:
    """Speaks what `thinker` writes about `batch`; iterate over `chunks`, then read `codes`, `cut` and `seconds`."""

    def __init__(
        self,
        params: dict,
        declaration: Declaration,
        embed: Callable[[], jax.Array],
        config: OmniConfig,
        batch: Batch,
        thinker: Session,
        voice: Voice,
    ):
        """params and declaration: the Talker's. embed() [V, D]: the Thinker's token embeddings, on the Talker's devices."""
        assert config.talker is not None
        self.params, self.declaration, self.embed, self.config, self.talker = (
            params,
            declaration,
            embed,
            config,
            config.talker,
        )
        self.batch, self.thinker, self.voice = batch, thinker, voice
        self.speakers = speaker_ids(voice.speaker, len(thinker.lengths), config)
        # The first spoken token, which stands in the last column, is filled in when it is known.
        unknown = [config.tts_eos_token_id] * len(self.speakers)
        self.prompt = speech_prompt(batch, unknown, self.speakers, config)
        self.hears = bool((self.prompt.hidden_index >= 0).any())
        self.columns = int(self.prompt.length.max())
        self.room = self.talker.text.max_position_embeddings - self.prompt.length
        if self.room.min() < 1:
            raise InputError(
                f"the Talker's context of {self.talker.text.max_position_embeddings} does not hold a prompt of "
                f"{self.columns} columns; shorten the conversation or its media, or leave out speech"
            )
        self.plan, self.values = voice.plan(config.talker), voice.values()
        self.seconds = 0.0
        self.made = 0
        self.state: SpeechState | None = None
        self.budget = np.zeros(len(self.speakers), np.int32)
        self.done = False
        self._codes: list[np.ndarray] = []

    @property
    def codes(self) -> list[np.ndarray]:
        """The codes of each row, int32 [Q, frames]."""
        Q = self.talker.num_code_groups
        none = np.empty((len(self.speakers), Q, 0), np.int32)
        return [row[:, row[0] >= 0] for row in np.concatenate([none, *self._codes], axis=2)]

    @property
    def cut(self) -> list[bool]:
        """Which rows were ended by their limit of frames, not by themselves."""
        return [0 < limit <= codes.shape[1] for limit, codes in zip(self.budget.tolist(), self.codes, strict=True)]

    def chunks(self, frames: int = FRAMES) -> Iterator[np.ndarray]:
        """Codes int32 [B, Q, n] (-1 where a row has ended), as far as the text allows.

        frames: how many at a time, at most FRAMES.
        """
        while not self.done:
            start = time.perf_counter()
            if self.state is None:
                if not all(ids or done for ids, done in zip(self.thinker.spoken, self.thinker.row_done, strict=True)):
                    return
                self._begin()
                if self.done:
                    return
            new = self._speak(frames)
            self.seconds += time.perf_counter() - start
            if not new.shape[2]:
                return
            self._codes.append(new)
            yield new

    def _begin(self) -> None:
        """Run the prompts, once the first spoken token of every row is known."""
        spoken = self.thinker.spoken
        prompt = _padded(self.prompt)
        for row, ids, length in zip(prompt.text_ids, spoken, prompt.length, strict=True):
            row[length - 1] = ids[0] if ids else row[length - 1]
        most = np.minimum(self.room, min(self.voice.max_frames, int(self.room.max())))
        self.budget = np.where([bool(ids) for ids in spoken], most, 0).astype(np.int32)
        self.done = not self.budget.any()
        if self.done:
            return
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.thinker.keys, np.uint32(SPEECH_KEY))
        columns = {name: getattr(prompt, name) for name in SpeechPrompt.__dataclass_fields__}
        self.state = prefill_talker(
            self.params,
            self.embed(),
            TalkerPrompt(**columns, budget=self.budget, keys=keys).placed(self.declaration.mesh),
            self._heard(),
            self.values,
            declaration=self.declaration,
            plan=self.plan,
            capacity=capacity_for(prompt.text_ids.shape[1]),
        )

    def _heard(self) -> jax.Array | None:
        """What the Thinker made of the prompts' media, on the Talker's devices."""
        if not self.hears:
            return None
        hidden = self.thinker.give_tapped(self.talker.accept_hidden_layer)
        return place(hidden, ("batch", None, None), self.declaration.mesh)

    def _speak(self, frames: int) -> np.ndarray:
        """The next frames, none if the text is not there yet."""
        assert self.state is not None
        frames = min(frames, FRAMES, self._allowed())
        if frames < 1:
            return np.empty((len(self.speakers), self.talker.num_code_groups, 0), np.int32)
        capacity = capacity_for(self.columns + self.made + frames)
        if capacity > self.state.cache.capacity:
            self.state = grow(self.state, capacity=capacity)
        codes, state = decode_frames(
            self.params,
            self.embed(),
            self.state,
            self._text(),
            np.int32(frames),
            self.values,
            declaration=self.declaration,
            plan=self.plan,
        )
        self.state, self.made = state, self.made + frames
        codes = np.asarray(codes)
        self.done = bool(np.asarray(state.done).all())
        return codes[:, :, : int((codes[:, 0] >= 0).sum(axis=1).max())]

    def _allowed(self) -> int:
        """How many more frames the text drawn so far allows."""
        known = [
            len(ids) - 1 - self.made
            for ids, done in zip(self.thinker.spoken, self.thinker.row_done, strict=True)
            if not done
        ]
        return min(known, default=FRAMES)

    def _text(self) -> np.ndarray:
        """What the next frames say, int32 [B, FRAMES]."""
        stream = np.full((len(self.speakers), FRAMES), self.config.tts_pad_token_id, np.int32)
        for row, ids in zip(stream, self.thinker.spoken, strict=True):
            said = [*ids, self.config.tts_eos_token_id][1 + self.made : 1 + self.made + FRAMES]
            row[: len(said)] = said
        return stream


def _padded(prompt: SpeechPrompt) -> SpeechPrompt:
    """The same prompt with a bucketed number of columns."""
    more = bucket(prompt.text_ids.shape[1]) - prompt.text_ids.shape[1]

    def pad(array: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)], constant_values=fill)

    return SpeechPrompt(
        text_ids=pad(prompt.text_ids, 0),
        hidden_index=pad(prompt.hidden_index, -1),
        codec_ids=pad(prompt.codec_ids, -1),
        position_ids=pad(prompt.position_ids, 0),
        rope_delta=prompt.rope_delta,
        length=prompt.length,
    )
