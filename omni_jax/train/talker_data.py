"""Rows of conversations with codes as samples of speech, and samples as the rows of a batch.

    {"messages": [..., {"role": "assistant", "content": "what is spoken"}], "codes": "a.npy", "speaker": "ethan"}

codes: a .npy file of whole numbers [Q, F] or [F, Q], or the same as a list of lists. In their place `speech` may name a
sound file, for the encoder that the recipe has. speaker: one of the model's; by default the recipe's. The last message
is what is spoken; what is before it is its prompt, in any form of `forms`. Earlier replies are not spoken.

A prompt is the one that the model would be given, and the reply's tokens are those of its text: they reach the Talker
one a frame, as when the model speaks. This module runs in worker processes and never imports jax; `talker_batch` makes
the batch of what `collate` returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.decode.prompt import has_media, pad_length
from omni_jax.errors import InputError
from omni_jax.inputs.batch import COARSE_FRAMES, Batch, bucket, coarse_bucket
from omni_jax.inputs.messages import Media, read_conversation
from omni_jax.inputs.options import UNSTATED, Options
from omni_jax.inputs.processor import Processor, Row
from omni_jax.inputs.prompt import prompt_ids
from omni_jax.inputs.speech import HEADER, OPENING, SpeechPrompt, speaker_ids, speech_prompt
from omni_jax.rows.columns import Columns
from omni_jax.rows.media import check_there, files_of
from omni_jax.rows.row import Problem, reason
from omni_jax.train.codes import Codebooks, Encoder, codes_of_row
from omni_jax.train.data import forms

COLUMNS = Columns(
    groups=(("messages", "conversations"), ("codes", "speech")),
    media=forms.COLUMNS.media,
    others=(*forms.COLUMNS.others, "speaker"),
    free=forms.COLUMNS.free,
)
# Where a row has no code.
NO_CODE = -1
UNSAID = ("tool_calls", "reasoning_content", "reasoning")


@dataclass(frozen=True, eq=False)
class SpeechSample:
    """One spoken reply: its prompt's token ids int32 [n] with one placeholder per medium, and the media.

    spoken: the reply's token ids, int32 [m]. codes: int32 [Q, F]. length: columns that the Talker reads at most. where:
    "file:line" of its row.
    """

    token_ids: np.ndarray
    media: tuple[Media, ...]
    spoken: np.ndarray
    codes: np.ndarray
    speaker: str
    length: int
    where: str


@dataclass(frozen=True, eq=False)
class SpokenRows:
    """Rows of samples, in NumPy: the fields of `talker_batch.SpeechBatch`; thinker: its prompts if they have media.

    learned: bool [B, F + 1], which states have a target. samples, problems, tokens: as in `data.recipe.Collated`.
    """

    prompt: SpeechPrompt
    text_ids: np.ndarray
    codes: np.ndarray
    thinker: Batch | None
    learned: np.ndarray
    samples: list[str]
    problems: list[Problem]
    tokens: int


@dataclass(frozen=True, eq=False)
class SpeechRecipe:
    """How rows become samples of speech, and these rows of a batch.

    max_length: most columns of a sample, prompt and frames. encoder: of sound; None for codes alone. speaker: of rows
    that name none. options: how media are resized, sampled and cut where their parts do not say so. enable_thinking:
    passed to the chat template if not None. hears: whether prompts may have media. coarse: whether batches are padded
    more, so that there are fewer sizes of them.
    """

    processor: Processor
    config: OmniConfig
    books: Codebooks
    max_length: int
    encoder: Encoder | None = None
    speaker: str = "ethan"
    options: Options = UNSTATED
    enable_thinking: bool | None = None
    hears: bool = True
    coarse: bool = False
    columns: Columns = field(default=COLUMNS)

    def samples(self, row: dict[str, Any], folder: Path, where: str) -> list[SpeechSample]:
        """The sample of a row without nulls; InputError for a row that cannot be used. folder: that of its file."""
        example = forms.read_example(row, folder)
        if not example.messages:
            raise InputError("'text' is not spoken to anybody; write a conversation as 'messages'")
        *before, last = example.messages
        spoken = self._spoken(last)
        speaker = row.get("speaker", self.speaker)
        speaker_ids([speaker], 1, self.config)
        conversation = read_conversation(before, example.tools)
        if conversation.media and not self.hears:
            raise InputError("the row has media, which are not heard with --no-media; leave the flag or the row out")
        for path, _ in files_of(conversation.media):
            check_there(path)
        thinking = self.enable_thinking
        ids = prompt_ids(conversation, self.processor.template, self.processor.tokenizer, enable_thinking=thinking)
        tokens = self.processor.plan_row(ids, conversation.media, self.options).tokens
        codes = codes_of_row(row, folder, self.encoder, self.books)
        sample = SpeechSample(
            token_ids=np.array(ids, np.int32),
            media=tuple(conversation.media),
            spoken=spoken,
            codes=codes,
            speaker=speaker,
            length=tokens + OPENING - HEADER + codes.shape[1],
            where=where,
        )
        self._check_length(sample.length)
        return [sample]

    def _check_length(self, length: int) -> None:
        assert self.config.talker is not None
        context = self.config.talker.text.max_position_embeddings
        most, name = min((self.max_length, "--max-length"), (context, "the Talker's context"))
        if length > most:
            raise InputError(
                f"prompt and frames take up to {length} columns, more than {name} of {most}; cut the speech into "
                "turns, or shorten the conversation or its media"
            )

    def _spoken(self, message: dict[str, Any]) -> np.ndarray:
        """The ids int32 [m] of the last message's text, at least one; the control tokens that it spells are text."""
        if message["role"] != "assistant":
            raise InputError("the last message is none of the assistant; end the row with the reply that is spoken")
        unsaid = [name for name in UNSAID if message.get(name)]
        if unsaid:
            raise InputError(f"the last message has {unsaid[0]!r}, which is not spoken; leave it out")
        content = message["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        if not all(isinstance(part.get("text"), str) for part in parts):
            raise InputError("the content of the last message is no text; give what is spoken as text")
        ids = self.processor.tokenizer.encode_plain("".join(part["text"] for part in parts))
        if not ids:
            raise InputError("the last message is empty; give the text that is spoken")
        return np.array(ids, np.int32)

    def collate(self, rows: Sequence[Sequence[SpeechSample]], count: int, width: int) -> SpokenRows:
        """`count` rows with one sample each, behind them padding; all sizes are bucketed, whatever the width.

        A sample whose media cannot be decoded any more is left out, and its problem is told.
        """
        problems: list[Problem] = []
        loaded = [(sample, self._loaded(sample, problems)) for (sample,) in rows]
        taken = [(sample, row) for sample, row in loaded if row is not None]
        if not taken:
            return _no_rows(count, problems)
        samples = [sample for sample, _ in taken]
        size, frame_sizes = (coarse_bucket, COARSE_FRAMES) if self.coarse else (bucket, ())
        batch = self.processor.batch_of([row for _, row in taken], row_tokens=frame_sizes, count=size)
        names = [sample.speaker for sample in samples]
        first = [int(sample.spoken[0]) for sample in samples]
        prompt = speech_prompt(batch, first, speaker_ids(names, len(names), self.config), self.config)
        frames = np.array([sample.codes.shape[1] for sample in samples] + [0] * (count - len(samples)))
        F = size(int(frames.max()))
        codes = [_padded(sample.codes, F) for sample in samples]
        text_ids = [text_of_frames(sample.spoken, F, self.config) for sample in samples]
        T, U = size(batch.token_ids.shape[1]), size(int(prompt.length.max()))
        T, U = (max(T, U), max(T, U)) if self.coarse else (T, U)
        batch = pad_length(batch, T)
        return SpokenRows(
            prompt=_to_the_right(_more_rows(prompt, count), U),
            text_ids=_filled(np.stack(text_ids), count, 0),
            codes=_filled(np.stack(codes), count, NO_CODE),
            thinker=_with_rows(batch, count) if has_media(batch) else None,
            learned=(np.arange(F + 1) <= frames[:, None]) & (frames > 0)[:, None],
            samples=[sample.where for sample in samples],
            problems=problems,
            tokens=int(prompt.length.sum() + frames.sum()),
        )

    def _loaded(self, sample: SpeechSample, problems: list[Problem]) -> Row | None:
        try:
            planned = self.processor.plan_row(sample.token_ids.tolist(), sample.media, self.options)
            return self.processor.load_row(planned)
        except Exception as error:
            problems.append(Problem(sample.where, reason(error)))
            return None


def _no_rows(count: int, problems: list[Problem]) -> SpokenRows:
    """Rows of which nothing is learned, since no sample could be used."""
    none = np.zeros((count, 0), np.int32)
    return SpokenRows(SpeechPrompt(*[none] * 6), none, none, None, none.astype(bool), [], problems, 0)


def text_of_frames(spoken: np.ndarray, F: int, config: OmniConfig) -> np.ndarray:
    """The token that each of F frames adds, int32 [F]: the reply's from its second on, the end of its text, padding."""
    said = [*spoken[1:].tolist(), config.tts_eos_token_id][:F]
    return np.array(said + [config.tts_pad_token_id] * (F - len(said)), np.int32)


def _padded(codes: np.ndarray, F: int) -> np.ndarray:
    return np.pad(codes, ((0, 0), (0, F - codes.shape[1])), constant_values=NO_CODE)


def _filled(rows: np.ndarray, count: int, fill: int, axis: int = 0) -> np.ndarray:
    """Rows [b, ...] with others behind them, `count` in all."""
    more = [(0, count - n if i == axis else 0) for i, n in enumerate(rows.shape)]
    return np.pad(rows, more, constant_values=fill)


def _more_rows(prompt: SpeechPrompt, count: int) -> SpeechPrompt:
    """The prompts and empty ones behind them."""
    return SpeechPrompt(
        text_ids=_filled(prompt.text_ids, count, 0),
        hidden_index=_filled(prompt.hidden_index, count, -1),
        codec_ids=_filled(prompt.codec_ids, count, -1),
        position_ids=_filled(prompt.position_ids, count, 0, axis=1),
        rope_delta=_filled(prompt.rope_delta, count, 0),
        length=_filled(prompt.length, count, 0),
    )


def _with_rows(batch: Batch, count: int) -> Batch:
    """The Thinker's prompts and empty ones behind them."""
    return replace(
        batch,
        token_ids=_filled(batch.token_ids, count, 0),
        mask=_filled(batch.mask, count, 0),
        position_ids=_filled(batch.position_ids, count, 0, axis=1),
        rope_delta=_filled(batch.rope_delta, count, 0),
        visual_index=_filled(batch.visual_index, count, -1),
        audio_index=_filled(batch.audio_index, count, -1),
    )


def _to_the_right(prompt: SpeechPrompt, U: int) -> SpeechPrompt:
    """The prompts with U columns, padded on the left, so that every row's frames begin in the same column."""
    column = np.arange(U) - (U - prompt.length)[:, None]

    def move(rows: np.ndarray, fill: int) -> np.ndarray:
        at = np.broadcast_to(np.maximum(column, 0), (*rows.shape[:-1], U))
        return np.where(column >= 0, np.take_along_axis(rows, at, axis=-1), rows.dtype.type(fill))

    return replace(
        prompt,
        text_ids=move(prompt.text_ids, 0),
        hidden_index=move(prompt.hidden_index, -1),
        codec_ids=move(prompt.codec_ids, -1),
        position_ids=move(prompt.position_ids, 0),
    )
