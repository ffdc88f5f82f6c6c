"""A row as samples of the Thinker with a mask of what is learned, and samples as the rows of a batch.

A conversation is one sample. Its replies are learned with their reasoning, tool calls and end token, unless the row
says otherwise (`forms`) or the template drops their reasoning (`inputs.replies`). A plain text is cut into samples of
at most `max_length` tokens, all of which are learned but the first of each, which nothing predicts. Media have one
placeholder until a batch is made; then they are decoded, and never learned.

This module runs in worker processes and never imports jax; `stream` makes the batch of what `collate` returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.inputs.batch import COARSE_FRAMES, bucket, coarse_bucket
from omni_jax.inputs.messages import Conversation, Media, read_conversation
from omni_jax.inputs.options import UNSTATED, Options
from omni_jax.inputs.processor import Loaded, Processor, Row
from omni_jax.inputs.prompt import AUDIO_END, expanded_size
from omni_jax.inputs.replies import ReplyEncoder
from omni_jax.rows.columns import Columns
from omni_jax.rows.media import check_there, files_of
from omni_jax.rows.row import Problem, reason
from omni_jax.train.data.forms import COLUMNS, Example, read_example

END_OF_TEXT, VISION_END = "<|endoftext|>", "<|vision_end|>"
# A frame is padded to at most this many times its own bucket, so that the frames of a batch have few sizes.
FRAME_PADDING = 2


@dataclass(frozen=True, eq=False)
class TextSample:
    """token_ids int32 [n] with one placeholder per medium, learned bool [n], and the media.

    length: tokens with the media at full length. where: "file:line" of its row.
    """

    token_ids: np.ndarray
    learned: np.ndarray
    media: tuple[Media, ...]
    length: int
    where: str


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of samples int32 [B, T], in NumPy: the fields of `train.batch.TextBatch`, with learned bool [B, T].

    samples: where the row of each sample is, in order. problems: samples that were left out, because a medium that was
    there could not be decoded. tokens: those of all samples.
    """

    token_ids: np.ndarray
    learned: np.ndarray
    position_ids: np.ndarray
    first_seen: np.ndarray
    media: tuple[Any, ...] | None
    samples: list[str]
    problems: list[Problem]
    tokens: int


@dataclass(frozen=True, eq=False)
class TextRecipe:
    """How rows become samples, and samples rows of a batch. max_length: most tokens of a sample, and of a row.

    options: how media are resized, sampled and cut where their parts do not say so. coarse: whether media are padded
    more, so that there are fewer sizes of batches.
    """

    processor: Processor
    replies: ReplyEncoder
    max_length: int
    options: Options = UNSTATED
    coarse: bool = False
    columns: Columns = field(default=COLUMNS)

    @classmethod
    def of(
        cls,
        processor: Processor,
        max_length: int,
        enable_thinking: bool | None = None,
        options: Options = UNSTATED,
        coarse: bool = False,
    ) -> "TextRecipe":
        """The recipe of a checkpoint's processor; InputError for a length beyond its context.

        enable_thinking: passed to the chat template if not None.
        """
        context = processor.config.thinker.text.max_position_embeddings
        if not 2 <= max_length <= context:
            raise InputError(f"max_length is {max_length}; give 2 to {context} tokens, which is the model's context")
        replies = ReplyEncoder.of(processor.template, processor.tokenizer, enable_thinking)
        return cls(processor, replies, max_length, options, coarse)

    def samples(self, row: dict[str, Any], folder: Path, where: str) -> list[TextSample]:
        """The samples of a row without nulls; InputError for a row that cannot be used, or has nothing to learn.

        folder: that of the row's file. Media are opened to know their size, and sounds decoded.
        """
        example = read_example(row, folder)
        return self._texts(example.text, where) if example.text is not None else [self._conversation(example, where)]

    def learned(self, row: dict[str, Any], folder: Path) -> np.ndarray:
        """The tokens of a row without nulls that are learned, int [n], however long it is; its media are not opened.

        InputError as of `samples`.
        """
        example = read_example(row, folder)
        if example.text is not None:
            texts = self._texts(example.text, "")
            return np.concatenate([one.token_ids[one.learned] for one in texts] or [np.zeros(0, np.int32)])
        ids, learned = self._marked(example, read_conversation(example.messages, example.tools))
        return np.array(ids)[learned]

    def _marked(self, example: Example, conversation: Conversation) -> tuple[list[int], np.ndarray]:
        """The ids of a conversation, and which of them are learned, bool [n]."""
        ids, owners = self.replies.encode(conversation)
        learned = np.array([owner >= 0 and owner not in example.silent for owner in owners])
        learned[np.isin(ids, self._of_media())] = False
        return ids, learned

    def _conversation(self, example: Example, where: str) -> TextSample:
        conversation = read_conversation(example.messages, example.tools)
        for path, _ in files_of(conversation.media):
            check_there(path)
        ids, learned = self._marked(example, conversation)
        if not learned.any():
            raise InputError("no token of the row is learned: it has no reply, or each is excluded or without its "
                             "reasoning; leave the row out, or state 'loss': true")  # fmt: skip
        length = self.processor.plan_row(ids, conversation.media, self.options).tokens
        if length > self.max_length:
            raise InputError(f"the row has {length} tokens, more than max_length {self.max_length}; raise it, or "
                             "shorten the row or its media")  # fmt: skip
        return TextSample(np.array(ids, np.int32), learned, tuple(conversation.media), length, where)

    def _texts(self, text: str, where: str) -> list[TextSample]:
        tokenizer = self.processor.tokenizer
        ids = np.array([*tokenizer.encode(text), tokenizer.token_id(END_OF_TEXT)], np.int32)
        if np.isin(ids, self._of_media()).any():
            raise InputError("the text holds a control token of media; write a conversation with the media themselves")
        pieces = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        # One token alone predicts nothing.
        return [TextSample(p, np.arange(len(p)) > 0, (), len(p), where) for p in pieces if len(p) > 1]

    def _of_media(self) -> list[int]:
        """The ids of placeholders and of the marks around them."""
        thinker, token_id = self.processor.config.thinker, self.processor.tokenizer.token_id
        placeholders = [thinker.image_token_id, thinker.video_token_id, thinker.audio_token_id]
        marks = [thinker.vision_start_token_id, thinker.audio_start_token_id, token_id(VISION_END), token_id(AUDIO_END)]
        return placeholders + marks

    def collate(self, rows: Sequence[Sequence[TextSample]], count: int, width: int) -> PackedRows:
        """`count` rows of `width` tokens with the samples of each one after the other, their media decoded.

        A sample whose media cannot be decoded any more is left out, and its problem is told.
        """
        problems: list[Problem] = []
        loaded = [[one for s in row if (one := self._loaded(s, problems)) is not None] for row in rows]
        B, T = count, width
        token_ids, learned = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
        positions, mask = np.zeros((3, B, T), np.float32), np.zeros((B, T), bool)
        first_seen = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        for b, samples in enumerate(loaded):
            at = 0
            for sample, row in samples:
                span = slice(at, at + sample.length)
                token_ids[b, span], mask[b, span], first_seen[b, span] = row.token_ids, True, at
                positions[:, b, span], learned[b, span] = row.positions, self._learned(sample, row)
                at += sample.length
        taken = [pair for samples in loaded for pair in samples]
        media = self._media(token_ids, mask, [medium for _, row in taken for medium in row.media])
        where = [sample.where for sample, _ in taken]
        return PackedRows(token_ids, learned, positions, first_seen, media, where, problems, int(mask.sum()))

    def _loaded(self, sample: TextSample, problems: list[Problem]) -> tuple[TextSample, Row] | None:
        try:
            row = self.processor.load_row(
                self.processor.plan_row(sample.token_ids.tolist(), sample.media, self.options)
            )
            if len(row.token_ids) != sample.length:
                raise InputError("its media have changed since they were read first; leave them until training ends")
        except Exception as error:
            problems.append(Problem(sample.where, reason(error)))
            return None
        return sample, row

    def _learned(self, sample: TextSample, row: Row) -> np.ndarray:
        """Which tokens of a row with its media at full length are learned: bool [T]."""
        thinker = self.processor.config.thinker
        placeholders = (thinker.image_token_id, thinker.video_token_id, thinker.audio_token_id)
        sizes = np.ones(len(sample.token_ids), int)
        sizes[np.isin(sample.token_ids, placeholders)] = [expanded_size(m.item, thinker) for m in row.media]
        return np.repeat(sample.learned, sizes)

    def _media(self, token_ids: np.ndarray, mask: np.ndarray, media: list[Loaded]) -> tuple[Any, ...] | None:
        """The fields of `train.batch.MediaRows`; None for text alone."""
        if not media:
            return None
        merge = self.processor.config.thinker.vision.spatial_merge_size**2
        frames = {m.item.grid[1] * m.item.grid[2] // merge for m in media if m.item.grid is not None}
        sizes = COARSE_FRAMES if self.coarse else frame_sizes(frames)
        count = coarse_bucket if self.coarse else bucket
        vision, seen, audio, heard = self.processor.arrange(token_ids, mask, media, sizes, count)
        groups = tuple((rows.patches, rows.grid) for rows in vision)
        return groups, None if audio is None else (audio.mel, audio.frames, audio.width), seen, heard


def frame_sizes(tokens: set[int]) -> list[int]:
    """Few sizes of rows for frames of so many merged tokens; each is at most `FRAME_PADDING` times a frame's bucket."""
    sizes: list[int] = []
    for size in sorted({bucket(n) for n in tokens}, reverse=True):
        if not sizes or sizes[-1] > FRAME_PADDING * size:
            sizes.append(size)
    return sizes
