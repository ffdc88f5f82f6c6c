"""Messages to a prepared batch: the one place where text and media meet before the model.

    messages -> check -> render, encode -> plan media -> load them -> expand -> positions -> pad rows, pack media

Each conversation becomes a row on its own, and rows are combined only then, so nothing in a row depends on its
neighbours; rows may hold different media, or none. NumPy only.

Source: HF `Qwen3OmniMoeProcessor` and, for the positions, `get_rope_index`. Deliberate differences: a video without
sound stays a plain video beside videos with sound; seconds per grid step are measured (see `video`); media that do not
fit the model's context or the memory are refused before they are decoded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError, InputError
from omni_jax.inputs.audio import load_audio, log_mel, token_count
from omni_jax.inputs.batch import AudioWindows, Batch, Count, VisionRows, bucket, pack_audio, pack_vision
from omni_jax.inputs.image import image_shape, load_image, patchify_frames, resize
from omni_jax.inputs.memory import check_memory
from omni_jax.inputs.messages import Media, is_conversation, read_conversation
from omni_jax.inputs.options import Options, check_options, read_defaults
from omni_jax.inputs.positions import MediaItem, rope_positions
from omni_jax.inputs.prompt import ChatTemplate, expand, prompt_ids
from omni_jax.inputs.settings import FILE, AudioSettings, ImageSettings, SizeLimits, VideoSettings, read_settings
from omni_jax.inputs.sizes import picture_size
from omni_jax.inputs.source import Source, name_of
from omni_jax.inputs.tokenizer import Tokenizer
from omni_jax.inputs.values import flag, listed, shown, whole
from omni_jax.inputs.video import SAMPLING, check_room, patchify_video, plan_video, video_audio

# The most memory that media take: copies of their patches at once; bytes per pixel of a picture while it is decoded.
PATCH_COPIES = 4
PIXEL_BYTES = 16
ROOM = "give the number of tokens that the context must leave, 0 or more"


@dataclass(frozen=True, eq=False)
class Loaded:
    """One medium ready for the encoders: patches float32 [t * h * w, patch_dim], mel float32 [M, frames], or both."""

    item: MediaItem
    patches: np.ndarray | None = None
    mel: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class PlannedMedium:
    """One medium before it is decoded: all its tokens, the visual ones, the pixels of its file, and how to load it."""

    tokens: int
    visual_tokens: int
    pixels: int
    load: Callable[[], Loaded]


@dataclass(frozen=True, eq=False)
class PlannedRow:
    """One conversation before its media are decoded: its ids with one placeholder per medium, and the media."""

    ids: Sequence[int]
    media: list[PlannedMedium]

    @property
    def tokens(self) -> int:
        """The tokens of the row with its media at full length."""
        return len(self.ids) - len(self.media) + sum(medium.tokens for medium in self.media)


@dataclass(frozen=True, eq=False)
class Row:
    """One conversation: ids int32 [T], positions float32 [3, T], rope_delta, and its media in order of appearance."""

    token_ids: np.ndarray
    positions: np.ndarray
    rope_delta: np.float32
    media: list[Loaded]


def _each_row(act: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
    """The results of `act` for each row; its errors name the row, if there are several."""
    made = []
    for i, row in enumerate(rows):
        try:
            made.append(act(row))
        except InputError as error:
            if len(rows) == 1:
                raise
            raise InputError(f"row {i}: {error}") from error
    return made


def _of_frames(medium: Media, options: Options) -> Options:
    """The options of a video, without those of the call that concern the sampling of files if it is sampled already."""
    if isinstance(medium.source, Source):
        return options
    names = SAMPLING if isinstance(medium.source, np.ndarray) else (*SAMPLING, "fps")
    return replace(options, **{name: getattr(medium.options, name) for name in names})


class Processor:
    """Prepares batches with the tokenizer, chat template and media settings of one checkpoint."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        preprocessor: dict,
        config: OmniConfig,
        file: str = FILE,
        limits: SizeLimits | None = None,
    ):
        """preprocessor: the contents of `file`, preprocessor_config.json; ConfigError where it contradicts `config`.

        limits: of pictures and frames, in place of those that the preprocessor states and of the constants for videos.
        """
        self.tokenizer, self.template, self.config = tokenizer, template, config
        self.image_settings = ImageSettings.from_hf(preprocessor, file)
        self.video_settings = VideoSettings.from_hf(preprocessor, file)
        self.audio_settings = AudioSettings.from_hf(preprocessor, file)
        if limits is not None:
            self.image_settings = self.image_settings.within(limits)
            self.video_settings = self.video_settings.within(limits)
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
                    f"{file}: '{name}' is {stated}, config.json says {expected}; "
                    "take both files from the same checkpoint"
                )

    @classmethod
    def from_dir(cls, directory: str | Path, config: OmniConfig) -> "Processor":
        """Read tokenizer.json, the chat template and preprocessor_config.json of a checkpoint directory."""
        (values, file), limits = read_settings(Path(directory)), SizeLimits.from_dir(Path(directory))
        return cls(Tokenizer(directory), ChatTemplate.from_dir(directory), values, config, file, limits)

    def prepare(
        self,
        messages: Any,
        *,
        use_audio_in_video: bool = False,
        tools: list[dict] | None = None,
        fps: float | None = None,
        media: Mapping[str, Any] | None = None,
        padding: str = "right",
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        max_new_tokens: int = 0,
    ) -> Batch:
        """Turn one conversation, or a list of them, into a batch with one row for each.

        use_audio_in_video: also read each video's own sound, interleaved with its frames. tools: JSON schemas of
        functions. fps: frames sampled per second of video. media: further options, by name (see `options.Options`), for
        all parts that do not state their own. padding: "right" or "left". add_generation_prompt: end with the beginning
        of an answer. enable_thinking: passed to the template if not None. max_new_tokens: room that the context must
        leave. Raises InputError for messages, media and settings that cannot be used, naming the row, message and part;
        what does not fit the context or the memory is refused before pictures are decoded.
        """
        conversations = [messages] if is_conversation(messages) else messages
        max_new_tokens = whole("max_new_tokens", max_new_tokens, ROOM, least=0)
        add_generation_prompt = flag("add_generation_prompt", add_generation_prompt)
        if enable_thinking is not None:
            enable_thinking = flag("enable_thinking", enable_thinking)
        defaults = read_defaults(media, fps, flag("use_audio_in_video", use_audio_in_video))

        def plan(conversation: Any) -> PlannedRow:
            checked = read_conversation(conversation, tools)
            ids = prompt_ids(
                checked,
                self.template,
                self.tokenizer,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
            )
            return self.plan_row(ids, checked.media, defaults, max_new_tokens)

        prompts = _each_row(plan, conversations)
        self._check_memory([planned for prompt in prompts for planned in prompt.media])
        rows = _each_row(
            lambda prompt: self._row(prompt.ids, [m.load() for m in prompt.media], max_new_tokens), prompts
        )
        return self.batch_of(rows, padding)

    def prepare_text(self, prompts: str | Sequence[str], *, padding: str = "right", max_new_tokens: int = 0) -> Batch:
        """Turn raw prompts into a batch, without a template; control tokens in them are control tokens.

        Args:
            prompts: a text, or a list of them.
            padding: "right" or "left".
            max_new_tokens: tokens that the context must leave free.
        """
        prompts = (
            [prompts] if isinstance(prompts, str) else listed("prompts", prompts, "give a text, or a list of them")
        )
        if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
            raise InputError(f"a prompt is {shown(wrong[0])}; give a text, or a list of them")
        max_new_tokens = whole("max_new_tokens", max_new_tokens, ROOM, least=0)
        rows = [self._row(self.tokenizer.encode(prompt), [], max_new_tokens) for prompt in prompts]
        return self.batch_of(rows, padding)

    def plan_row(
        self, ids: Sequence[int], media: Sequence[Media], defaults: Options, max_new_tokens: int = 0
    ) -> PlannedRow:
        """A row of ids with one placeholder for each of its media, which are opened but not decoded.

        defaults: options for media that do not state their own. Raises InputError for a medium that cannot be used, and
        where the context does not hold the row and `max_new_tokens` more.
        """
        text = len(ids) - len(media)
        room = self.config.thinker.text.max_position_embeddings - max_new_tokens - text
        self._check_context(text, max_new_tokens)
        return PlannedRow(ids, self._plan_all(media, defaults, room))

    def load_row(self, planned: PlannedRow) -> Row:
        """The row with its media decoded; InputError for one that cannot be decoded or that memory does not hold."""
        self._check_memory(planned.media)
        return self._row(planned.ids, [medium.load() for medium in planned.media], 0)

    def _plan_all(self, media: Sequence[Media], defaults: Options, room: int) -> list[PlannedMedium]:
        """Plan media one by one; InputError at the first with which they take more than `room` tokens."""
        planned, left = [], room
        for medium in media:
            options = medium.options.over(defaults)
            check_options(options, medium.where)
            planned.append(self._plan(medium, options, max(left, 0)))
            left -= planned[-1].tokens
            if left < 0:
                raise InputError(
                    f"{medium.where}: with it, media take {room - left} tokens of {room} that are left of the context; "
                    "send fewer or smaller ones, state max_pixels, or sample a video at a lower fps"
                )
        return planned

    def _plan(self, medium: Media, options: Options, room: int) -> PlannedMedium:
        """The size of a medium, and how to load it; the errors of both name the message and part."""

        def named(act: Callable[[], Any]) -> Any:
            try:
                return act()
            except InputError as error:
                raise InputError(f"{medium.where}: {error}") from error

        plans = {"image": self._plan_image, "audio": self._plan_audio, "video": self._plan_video}
        planned = named(lambda: plans[medium.kind](medium, options, room))
        return replace(planned, load=lambda: named(planned.load))

    def _plan_image(self, medium: Media, options: Options, _: int) -> PlannedMedium:
        settings = self.image_settings
        shape = image_shape(medium.source)
        height, width = picture_size(shape, settings, options)

        def load() -> Loaded:
            image = load_image(medium.source)
            resized = resize(image, *picture_size(image.shape, settings, options))
            frames = np.broadcast_to(resized, (settings.temporal_patch_size, *resized.shape))
            patches, grid = patchify_frames(frames, settings)
            return Loaded(MediaItem("image", grid), patches)

        tokens = (height // settings.factor) * (width // settings.factor)
        return PlannedMedium(tokens, tokens, shape[0] * shape[1], load)

    def _plan_audio(self, medium: Media, options: Options, _: int) -> PlannedMedium:
        start, end = options.audio_start or 0.0, options.audio_end
        samples = load_audio(medium.source, medium.rate, start=start, end=end)
        tokens = self._audio_tokens(samples)

        def load() -> Loaded:
            return Loaded(MediaItem("audio", audio_tokens=tokens), mel=log_mel(samples, self.audio_settings))

        return PlannedMedium(tokens, 0, 0, load)

    def _plan_video(self, medium: Media, options: Options, room: int) -> PlannedMedium:
        settings = self.video_settings
        rate = medium.rate if isinstance(medium.source, np.ndarray | list | tuple) else None
        plan = plan_video(medium.source, settings, rate, options=_of_frames(medium, options), room=room)
        check_room(plan, settings, f"video {name_of(medium.source)}", room)
        samples = None
        if options.use_audio_in_video and isinstance(medium.source, Source):
            samples = video_audio(medium.source, options=options)
        tokens = 0 if samples is None else self._audio_tokens(samples)

        def load() -> Loaded:
            patches, grid, seconds = patchify_video(plan.load(), settings)
            mel = None if samples is None else log_mel(samples, self.audio_settings)
            return Loaded(MediaItem("video", grid, seconds, tokens), patches, mel)

        seen = plan.tokens(settings)
        marks = 2 if tokens else 0
        return PlannedMedium(seen + tokens + marks, seen, 0, load)

    def _audio_tokens(self, samples: np.ndarray) -> int:
        return token_count(samples.size // self.audio_settings.hop_samples, self.config.thinker.audio.chunk_frames)

    def _check_memory(self, planned: Sequence[PlannedMedium]) -> None:
        """Raise InputError for media whose patches, with their copies in rows, need more memory than is free."""
        if not planned:
            return
        settings = self.image_settings
        patches = sum(p.visual_tokens for p in planned) * settings.merge_size**2
        pixels = max((p.pixels for p in planned), default=0)
        needed = patches * settings.patch_dim * 4 * PATCH_COPIES + pixels * PIXEL_BYTES
        check_memory(needed, "pictures and videos", "send fewer or smaller ones, or state max_pixels or fps")

    def _row(self, ids: Sequence[int], media: list[Loaded], max_new_tokens: int) -> Row:
        items = [loaded.item for loaded in media]
        token_ids = expand(ids, items, self.tokenizer, self.config.thinker)
        if not len(token_ids):
            raise InputError("the prompt is empty; write something")
        self._check_context(len(token_ids), max_new_tokens)
        return Row(token_ids, *rope_positions(token_ids, items, self.config.thinker), media)

    def _check_context(self, tokens: int, max_new_tokens: int) -> None:
        context = self.config.thinker.text.max_position_embeddings
        if tokens + max_new_tokens > context:
            raise InputError(
                f"a prompt of {tokens} tokens and {max_new_tokens} new ones exceed the context of {context}; "
                "shorten the prompt, send fewer or smaller media, or ask for fewer tokens"
            )

    def batch_of(
        self, rows: list[Row], padding: str = "right", row_tokens: Sequence[int] = (), count: Count = bucket
    ) -> Batch:
        """Combine rows to a batch; at padding, ids and positions are 0 and never read.

        row_tokens, count: see `pack_vision`.
        """
        if padding not in ("left", "right"):
            raise InputError(f"padding {padding!r}; choose 'left' or 'right'")
        if not rows:
            raise InputError("no conversations; give at least one")
        B, T = len(rows), max(len(row.token_ids) for row in rows)
        token_ids, mask = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
        positions = np.zeros((3, B, T), np.float32)
        for b, row in enumerate(rows):
            n = len(row.token_ids)
            span = slice(T - n, T) if padding == "left" else slice(0, n)
            token_ids[b, span], mask[b, span] = row.token_ids, True
            positions[:, b, span] = row.positions
        media = [m for row in rows for m in row.media]
        vision, visual_index, audio, audio_index = self.arrange(token_ids, mask, media, row_tokens, count)
        return Batch(
            token_ids=token_ids,
            mask=mask,
            position_ids=positions,
            rope_delta=np.array([row.rope_delta for row in rows], np.float32),
            vision=vision,
            visual_index=visual_index,
            audio=audio,
            audio_index=audio_index,
            items=tuple(tuple(medium.item for medium in row.media) for row in rows),
        )

    def arrange(
        self,
        token_ids: np.ndarray,
        mask: np.ndarray,
        media: Sequence[Loaded],
        row_tokens: Sequence[int] = (),
        count: Count = bucket,
    ) -> tuple[tuple[VisionRows, ...], np.ndarray, AudioWindows | None, np.ndarray]:
        """The media of rows int32 [B, T], and where each token finds its embedding: fields of `Batch`.

        mask: bool [B, T], false at padding. media: those of all rows in order of appearance. row_tokens
        and count: see `pack_vision`.
        """
        thinker = self.config.thinker
        pictures = [(m.patches, m.item.grid) for m in media if m.patches is not None and m.item.grid is not None]
        vision, seen = pack_vision(pictures, thinker.vision.spatial_merge_size, row_tokens, count)
        audio, heard = pack_audio([m.mel for m in media if m.mel is not None], thinker.audio, count)
        kinds = ((thinker.image_token_id, thinker.video_token_id), seen), ((thinker.audio_token_id,), heard)
        visual_index, audio_index = (np.full(token_ids.shape, -1, np.int32) for _ in kinds)
        for index, (ids, found) in zip((visual_index, audio_index), kinds, strict=True):
            index[np.isin(token_ids, ids) & mask] = np.concatenate([np.empty(0, np.int32), *found])
        return vision, visual_index, audio, audio_index
