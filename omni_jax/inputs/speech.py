"""The Talker's prompt: which columns it reads, what each is made of, and where it stands.

Data flow: a prepared `Batch` and the first token that the Thinker has drawn become a `SpeechPrompt`, which the Talker
turns into embeddings. A row's columns are the tokens of its user, over all turns, then nine that open the answer:

    text    the user's turns | header x 3 | pad       pad        pad        pad      bos        the first token
    codec   nothing          | nothing    | nothink   think_bos  think_eos  speaker  codec_pad  codec_bos

Text goes through the Thinker's embedding and the Talker's text projection; a medium's tokens through the hidden
projection of the Thinker's hidden states, which `hidden_index` finds. Results of tools are the user's, for the chat
template writes them in turns of this role; instructions of the system and earlier answers are not read.

Source: HF `Qwen3OmniMoeForConditionalGeneration.generate`, `_get_talker_user_parts`, `_get_talker_assistant_parts`, and
the Talker's `get_rope_index`. Deliberate differences:
- Sound inside a video keeps its interleaved positions. The reference does not tell its Talker `use_audio_in_video`,
  which therefore counts the media of the prompt differently from the Thinker.
- Media of turns that are dropped are dropped with them. The reference places the user's pictures and videos by the
  sizes of those, if they come first.
- The first spoken token is the first one drawn. The reference takes whatever follows the header in the prompt, so it
  speaks an empty think block that the template has written.
- Every row is assembled alone and has its own speaker. The reference reads the header where the first row has it, and a
  prompt without a user's turn makes it read the whole prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.errors import InputError
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.positions import MediaItem, items_at, rope_positions

HEADER = 3  # tokens: the turn's start, the role, a line break
OPENING = 9  # columns behind the user's tokens


@dataclass(frozen=True, eq=False)
class SpeechPrompt:
    """What the Talker reads before its first frame, in NumPy: rows of U columns, padded on the right.

    text_ids: int32 [B, U], ids of the Thinker's vocabulary; 0 at media and padding. hidden_index: int32 [B, U], the
    column of a medium's token in its row of the batch; -1 elsewhere. codec_ids: int32 [B, U], what is added to the
    column, an id of the Talker's vocabulary; -1 for nothing. position_ids: float32 [3, B, U] (time, height, width); 0
    at padding. rope_delta: float32 [B]; the position of the next column is length + rope_delta. length: int32 [B].
    """

    text_ids: np.ndarray
    hidden_index: np.ndarray
    codec_ids: np.ndarray
    position_ids: np.ndarray
    rope_delta: np.ndarray
    length: np.ndarray


@dataclass(frozen=True, eq=False)
class _Row:
    """One row: ids, indices and codec ids, int32 [n], positions float32 [3, n], rope_delta."""

    text_ids: np.ndarray
    hidden_index: np.ndarray
    codec_ids: np.ndarray
    positions: np.ndarray
    rope_delta: np.float32


def speech_prompt(
    batch: Batch, first_spoken: Sequence[int], speaker_ids: Sequence[int], config: OmniConfig
) -> SpeechPrompt:
    """Assemble the Talker's prompt for each row of a batch, whichever side its padding is on.

    first_spoken: the first token id drawn for each row. speaker_ids: each row's, see `speaker_ids`. Raises InputError
    for a row that opens no answer, for media that do not fit their placeholders, and for a model that cannot speak.
    """
    talker = _talker(config)
    items = batch.items or ((),) * len(batch.token_ids)
    rows = []
    for b, (spoken, speaker, media) in enumerate(zip(first_spoken, speaker_ids, items, strict=True)):
        try:
            rows.append(_row(batch, b, spoken, speaker, media, config, talker))
        except InputError as error:
            if len(items) == 1:
                raise
            raise InputError(f"row {b}: {error}") from error
    return _side_by_side(rows)


def speaker_ids(speaker: str | Sequence[str], rows: int, config: OmniConfig) -> list[int]:
    """The codec id of each row's speaker, given one name for all rows or one each; see `speaker_id`."""
    talker = _talker(config)
    names = [speaker] * rows if isinstance(speaker, str) else speaker
    if not isinstance(names, Sequence):
        raise InputError(f"speaker is {speaker!r}; give a name, or one for each conversation")
    if len(names) != rows:
        raise InputError(f"{len(names)} speakers for {rows} conversations; give one, or one for each")
    return [speaker_id(name, talker) for name in names]


def speaker_id(name: str, config: TalkerConfig) -> int:
    """The codec id of a speaker; case does not count. Raises InputError with the names that the model knows."""
    known = {known.lower(): i for known, i in config.speakers}
    if not isinstance(name, str) or name.lower() not in known:
        raise InputError(f"the model has no speaker {name!r}; choose from {', '.join(sorted(known))}")
    return known[name.lower()]


def _talker(config: OmniConfig) -> TalkerConfig:
    missing = [part for part in ("talker", "code2wav") if getattr(config, part) is None]
    if config.talker is None or missing:
        raise InputError(
            f"this model cannot speak, it has no {' and '.join(missing)} (enable_audio_output is false in its "
            "config.json, as in Thinking and Captioner checkpoints); ask for text only"
        )
    return config.talker


def _row(
    batch: Batch,
    b: int,
    spoken: int,
    speaker: int,
    items: Sequence[MediaItem],
    config: OmniConfig,
    talker: TalkerConfig,
) -> _Row:
    columns = np.flatnonzero(batch.mask[b])
    ids = batch.token_ids[b, columns]
    is_user, header = _is_user(ids, config), _header(ids, config)
    columns, user = columns[is_user], ids[is_user]
    is_medium = (batch.visual_index[b, columns] >= 0) | (batch.audio_index[b, columns] >= 0)
    pads = [config.tts_pad_token_id] * (OPENING - HEADER - 2)
    opening = [*header, *pads, config.tts_bos_token_id, spoken]
    codec = [talker.codec_nothink_id, talker.codec_think_bos_id, talker.codec_think_eos_id]
    codec += [speaker, talker.codec_pad_id, talker.codec_bos_id]
    # The opening counts on as text does, whatever its ids.
    paced = replace(config.thinker, position_id_per_seconds=talker.position_id_per_seconds)
    placed = np.concatenate([user, [config.tts_pad_token_id] * OPENING])
    positions, rope_delta = rope_positions(placed, items_at(ids, items, is_user, paced), paced)
    return _Row(
        text_ids=np.concatenate([np.where(is_medium, 0, user), opening]),
        hidden_index=np.concatenate([np.where(is_medium, columns, -1), [-1] * OPENING]),
        codec_ids=np.concatenate([[-1] * (len(user) + OPENING - len(codec)), codec]),
        positions=positions,
        rope_delta=rope_delta,
    )


def _is_user(ids: np.ndarray, config: OmniConfig) -> np.ndarray:
    """Which tokens [T] lie in a turn of the user, from its start mark to the next one: bool [T]."""
    is_user = np.zeros(len(ids), bool)
    for start, end in pairwise([*np.flatnonzero(ids == config.im_start_token_id).tolist(), len(ids)]):
        is_user[start:end] = ids[start + 1 : start + 2].tolist() == [config.user_token_id]
    return is_user


def _header(ids: np.ndarray, config: OmniConfig) -> list[int]:
    """The tokens that head the last turn of the assistant."""
    opens = np.flatnonzero((ids[:-1] == config.im_start_token_id) & (ids[1:] == config.assistant_token_id))
    header = ids[opens[-1] : opens[-1] + HEADER].tolist() if opens.size else []
    if len(header) < HEADER:
        raise InputError(
            "the prompt opens no turn of the assistant, and speech is an answer; prepare messages with a generation "
            "prompt, or end a prompt of your own with '<|im_start|>assistant' and a line break"
        )
    return header


def _side_by_side(rows: list[_Row]) -> SpeechPrompt:
    length = np.array([len(row.text_ids) for row in rows], np.int32)
    B, U = len(rows), int(length.max())
    prompt = SpeechPrompt(
        text_ids=np.zeros((B, U), np.int32),
        hidden_index=np.full((B, U), -1, np.int32),
        codec_ids=np.full((B, U), -1, np.int32),
        position_ids=np.zeros((3, B, U), np.float32),
        rope_delta=np.array([row.rope_delta for row in rows], np.float32),
        length=length,
    )
    for b, (row, n) in enumerate(zip(rows, length, strict=True)):
        prompt.text_ids[b, :n], prompt.hidden_index[b, :n] = row.text_ids, row.hidden_index
        prompt.codec_ids[b, :n], prompt.position_ids[:, b, :n] = row.codec_ids, row.positions
    return prompt
