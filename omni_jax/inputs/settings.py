"""How media become patches and mel frames: the settings that a checkpoint states in `preprocessor_config.json`.

The file describes images and audio; the reference's processor class adds the size limits and the sampling of videos,
which stand here as named constants because no file states them. Whatever the file does state has no default: a missing
key is an error.

Source: transformers `Qwen2VLImageProcessor`, `Qwen2VLVideoProcessor`, `WhisperFeatureExtractor`, and the class
attributes of `Qwen3OmniMoeProcessor`; the two frames per second are the official recipe's (qwen-omni-utils).
"""

from dataclasses import dataclass, replace

from omni_jax.errors import ConfigError

SAMPLING_RATE = 16_000  # samples per second; the encoder was trained on nothing else
CHANNELS = 3

# Qwen3OmniMoeProcessor.videos_kwargs["size"]: the area of a resized frame, in pixels.
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 128 * 32 * 32, 768 * 32 * 32
VIDEO_FRAMES_PER_SECOND = 2.0
VIDEO_MIN_FRAMES, VIDEO_MAX_FRAMES = 4, 768


def _get(values: dict, name: str, kind: type | tuple[type, ...]):
    if name not in values:
        raise ConfigError(f"preprocessor_config.json: '{name}' is missing; take the file from the checkpoint itself")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(f"preprocessor_config.json: '{name}' is {value!r}, of the wrong type")
    return value


def _count(values: dict, name: str) -> int:
    value = _get(values, name, int)
    if value < 1:
        raise ConfigError(f"preprocessor_config.json: '{name}' is {value}, not a positive count")
    return value


def _expect(values: dict, name: str, allowed: object) -> None:
    if name in values and values[name] != allowed:
        raise ConfigError(f"preprocessor_config.json: '{name}' is {values[name]!r}; only {allowed!r} is supported")


def _channels(values: dict, name: str) -> tuple[float, ...]:
    numbers = _get(values, name, (list, tuple))
    if len(numbers) != CHANNELS or not all(isinstance(x, (int, float)) for x in numbers):
        raise ConfigError(f"preprocessor_config.json: '{name}' is {numbers!r}, not {CHANNELS} numbers")
    return tuple(float(x) for x in numbers)


@dataclass(frozen=True)
class ImageSettings:
    """Size limits (pixels of a resized picture), normalisation (per channel, on values of 0 to 1) and patch sizes."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Pixels that a side must be a multiple of: one merged token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch row: channels x frames x height x width."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_hf(cls, values: dict) -> "ImageSettings":
        """Read a parsed `preprocessor_config.json`; raise ConfigError naming the key that is missing or unsupported."""
        for name, allowed in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
            _expect(values, name, allowed)
        settings = cls(
            min_pixels=_count(values, "min_pixels"),
            max_pixels=_count(values, "max_pixels"),
            patch_size=_count(values, "patch_size"),
            temporal_patch_size=_count(values, "temporal_patch_size"),
            merge_size=_count(values, "merge_size"),
            mean=_channels(values, "image_mean"),
            std=_channels(values, "image_std"),
        )
        if 0.0 in settings.std:
            raise ConfigError("preprocessor_config.json: 'image_std' holds a zero")
        return settings


@dataclass(frozen=True)
class VideoSettings:
    """How a video is sampled (frames per second, fewest and most frames) and how each frame becomes patches."""

    frame: ImageSettings
    frames_per_second: float
    min_frames: int
    max_frames: int

    @classmethod
    def from_hf(cls, values: dict) -> "VideoSettings":
        """Read a parsed `preprocessor_config.json`; the video's size limits and sampling are the processor class's."""
        frame = replace(ImageSettings.from_hf(values), min_pixels=VIDEO_MIN_PIXELS, max_pixels=VIDEO_MAX_PIXELS)
        return cls(frame, VIDEO_FRAMES_PER_SECOND, VIDEO_MIN_FRAMES, VIDEO_MAX_FRAMES)


@dataclass(frozen=True)
class AudioSettings:
    """The log-mel spectrogram: mel bins, and the Fourier window and its hop in samples at 16 kHz."""

    mel_bins: int
    n_fft: int
    hop_samples: int

    @classmethod
    def from_hf(cls, values: dict) -> "AudioSettings":
        """Read a parsed `preprocessor_config.json`; raise ConfigError naming the key that is missing or unsupported."""
        for name, allowed in (("sampling_rate", SAMPLING_RATE), ("dither", 0.0), ("padding_value", 0.0)):
            _expect(values, name, allowed)
        return cls(
            mel_bins=_count(values, "feature_size"),
            n_fft=_count(values, "n_fft"),
            hop_samples=_count(values, "hop_length"),
        )
