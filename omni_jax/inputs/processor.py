"""Messages to a prepared batch: the one place where text and media meet before the model.

    messages -> check -> load media, patches and mel -> render, encode, expand -> positions -> pad rows, pack media

Each conversation becomes a row on its own and rows are only then laid side by side, so nothing in a row depends on its
neighbours; rows may hold different media, or none. NumPy only.

Source: HF `Qwen3OmniMoeProcessor` and, for the positions, `get_rope_index`. Deliberate differences: a video without
sound among sounding ones stays a plain video; seconds per grid step are measured (see `video`); what does not fit the
model's context is an error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.inputs.audio import load_audio, log_mel, token_count
from omni_jax.inputs.batch import Batch, pack_audio, pack_vision
from omni_jax.inputs.image import load_image, patchify_image
from omni_jax.inputs.messages import Media, is_conversation, read_conversation
from omni_jax.inputs.positions import MediaItem, rope_positions
from omni_jax.inputs.prompt import ChatTemplate, expand, prompt_ids
from omni_jax.inputs.settings import AudioSettings, ImageSettings, VideoSettings
from omni_jax.inputs.source import is_source
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.video import load_video, patchify_video, video_audio


@dataclass(frozen=True, eq=False)
class _Loaded:
    """One medium ready for the encoders: patches float32 [t * h * w, patch_dim], mel float32 [M, frames], or both."""

    item: MediaItem
    patches: np.ndarray | None = None
    mel: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class _Row:
    """One conversation: ids int32 [T], positions float32 [3, T], rope_delta, and its media in order of appearance."""

    token_ids: np.ndarray
    positions: np.ndarray
    rope_delta: np.float32
    media: list[_Loaded]


class Processor:
    """Prepares batches with the tokenizer, chat template and media settings of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, preprocessor: dict, config: OmniConfig):
        """`preprocessor` is a parsed preprocessor_config.json; ConfigError where it contradicts `config`."""
        self.tokenizer, self.template, self.config = tokenizer, template, config
        self.image_settings = ImageSettings.from_hf(preprocessor)
        self.video_settings = VideoSettings.from_hf(preprocessor)
        self.audio_settings = AudioSettings.from_hf(preprocessor)
        tokenizer.check_rows(config.thinker.text.vocab_size)
        tokenizer.check_ids(config)
        vision, settings = config.thinker.vision, self.image_settings
        for name, stated, expected in (
            ("patch_size", settings.patch_size, vision.patch_size),
            ("temporal_patch_size", settings.temporal_patch_size, vision.temporal_patch_size),
            ("merge_size", settings.merge_size, vision.spatial_merge_size),
            ("feature_size", self.audio_settings.mel_bins, config.thinker.audio.mel_bins),
        ):
            if stated != expected:
                raise ConfigError(
                    f"preprocessor_config.json: '{name}' is {stated}, config.json says {expected}; "
                    "take both files from the same checkpoint"
                )

    @classmethod
    def from_dir(cls, directory: str | Path, config: OmniConfig) -> "Processor":
        """Read tokenizer.json, the chat template and preprocessor_config.json of a checkpoint directory."""
        path = Path(directory) / "preprocessor_config.json"
        try:
            values = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy it from the original checkpoint") from error
        return cls(Tokenizer(directory), ChatTemplate.from_dir(directory), values, config)

    def prepare(
        self,
        messages: Any,
        *,
        use_audio_in_video: bool = False,
        tools: list[dict] | None = None,
        fps: float | None = None,
        padding: str = "right",
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        max_new_tokens: int = 0,
    ) -> Batch:
        """Turn one conversation, or a list of them, into a batch of as many rows.

        use_audio_in_video: hear each video's own sound, interleaved with its frames. tools: JSON schemas of functions.
        fps: frames sampled per second of video, unless a part states its own. padding: "right" or "left".
        enable_thinking: handed to the template if given. max_new_tokens: room that the context must leave.
        Raises InputError for messages, media and settings that cannot be used, naming the row, message and part.
        """
        conversations = [messages] if is_conversation(messages) else messages
        rows = []
        for i, conversation in enumerate(conversations):
            try:
                checked = read_conversation(conversation, tools)
                media = self._load_all(checked.media, use_audio_in_video, fps)
                ids = prompt_ids(
                    checked,
                    self.template,
                    self.tokenizer,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=enable_thinking,
                )
                rows.append(self._row(ids, media, max_new_tokens))
            except InputError as error:
                if len(conversations) == 1:
                    raise
                raise InputError(f"row {i}: {error}") from error
        return self._batch(rows, padding)

    def prepare_text(self, prompts: str | Sequence[str], *, padding: str = "right", max_new_tokens: int = 0) -> Batch:
        """Turn raw prompts, written without a template by someone who means their control tokens, into a batch."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self._row(self.tokenizer.encode(prompt), [], max_new_tokens) for prompt in prompts]
        return self._batch(rows, padding)

    def _load_all(self, media: Sequence[Media], use_audio_in_video: bool, fps: float | None) -> list[_Loaded]:
        """Load media one by one, and stop at the one with which they cannot fit the context any more."""
        loaded, tokens = [], 0
        context = self.config.thinker.text.max_position_embeddings
        for medium in media:
            loaded.append(self._load(medium, use_audio_in_video, fps))
            item = loaded[-1].item
            tokens += item.audio_tokens + prod(item.grid or (0,)) // self.image_settings.merge_size**2
            if tokens > context:
                raise InputError(
                    f"{medium.where}: with it, media take {tokens} tokens of a context of {context}; send fewer or "
                    "smaller ones, or sample a video at a lower fps"
                )
        return loaded

    def _load(self, medium: Media, use_audio_in_video: bool, fps: float | None) -> _Loaded:
        try:
            if medium.kind == "image":
                return self._load_image(medium)
            if medium.kind == "audio":
                return self._load_audio(medium)
            return self._load_video(medium, use_audio_in_video, fps if medium.rate is None else medium.rate)
        except InputError as error:
            raise InputError(f"{medium.where}: {error}") from error

    def _load_image(self, medium: Media) -> _Loaded:
        patches, grid = patchify_image(load_image(medium.source), self.image_settings)
        return _Loaded(MediaItem("image", grid), patches)

    def _load_audio(self, medium: Media) -> _Loaded:
        rate = None if medium.rate is None else round(medium.rate)
        mel, tokens = self._hear(load_audio(medium.source, rate))
        return _Loaded(MediaItem("audio", audio_tokens=tokens), mel=mel)

    def _load_video(self, medium: Media, use_audio_in_video: bool, fps: float | None) -> _Loaded:
        video = load_video(medium.source, self.video_settings, fps)
        patches, grid, seconds = patchify_video(video, self.video_settings)
        samples = video_audio(medium.source) if use_audio_in_video and is_source(medium.source) else None
        mel, tokens = (None, 0) if samples is None else self._hear(samples)
        return _Loaded(MediaItem("video", grid, seconds, tokens), patches, mel)

    def _hear(self, samples: np.ndarray) -> tuple[np.ndarray, int]:
        """The mel float32 [M, frames] of a clip and the number of its tokens."""
        mel = log_mel(samples, self.audio_settings)
        return mel, token_count(mel.shape[1], self.config.thinker.audio.chunk_frames)

    def _row(self, ids: Sequence[int], media: list[_Loaded], max_new_tokens: int) -> _Row:
        items = [loaded.item for loaded in media]
        token_ids = expand(ids, items, self.tokenizer, self.config.thinker)
        context = self.config.thinker.text.max_position_embeddings
        if not len(token_ids):
            raise InputError("the prompt is empty; write something")
        if len(token_ids) + max_new_tokens > context:
            raise InputError(
                f"a prompt of {len(token_ids)} tokens and {max_new_tokens} new ones exceed the context of {context}; "
                "shorten the prompt, send fewer or smaller media, or ask for fewer tokens"
            )
        return _Row(token_ids, *rope_positions(token_ids, items, self.config.thinker), media)

    def _batch(self, rows: list[_Row], padding: str) -> Batch:
        """Lay rows side by side; ids are 0 and positions 0 at padding, where nothing reads them."""
        if padding not in ("left", "right"):
            raise InputError(f"padding {padding!r}; choose 'left' or 'right'")
        if not rows:
            raise InputError("no conversations; give at least one")
        B, T = len(rows), max(len(row.token_ids) for row in rows)
        thinker = self.config.thinker
        media = [medium for row in rows for medium in row.media]
        pictures = [(m.patches, m.item.grid) for m in media if m.patches is not None and m.item.grid is not None]
        vision, visual = pack_vision(pictures, thinker.vision.spatial_merge_size)
        audio, heard = pack_audio([m.mel for m in media if m.mel is not None], thinker.audio)
        batch = Batch(
            token_ids=np.zeros((B, T), np.int32),
            mask=np.zeros((B, T), bool),
            position_ids=np.zeros((3, B, T), np.float32),
            rope_delta=np.array([row.rope_delta for row in rows], np.float32),
            vision=vision,
            visual_index=np.full((B, T), -1, np.int32),
            audio=audio,
            audio_index=np.full((B, T), -1, np.int32),
            items=tuple(tuple(medium.item for medium in row.media) for row in rows),
        )
        for b, row in enumerate(rows):
            n = len(row.token_ids)
            span = slice(T - n, T) if padding == "left" else slice(0, n)
            batch.token_ids[b, span], batch.mask[b, span] = row.token_ids, True
            batch.position_ids[:, b, span] = row.positions
        seen = np.isin(batch.token_ids, (thinker.image_token_id, thinker.video_token_id)) & batch.mask
        batch.visual_index[seen] = np.concatenate([np.empty(0, np.int32), *visual])
        listened = (batch.token_ids == thinker.audio_token_id) & batch.mask
        batch.audio_index[listened] = np.concatenate([np.empty(0, np.int32), *heard])
        return batch
