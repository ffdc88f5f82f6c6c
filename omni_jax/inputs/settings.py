"""How media become patches and mel frames: the settings that a checkpoint states in `preprocessor_config.json`.

The file describes images and audio; the reference's processor class adds the size limits and the sampling of videos,
which stand here as named constants because no file states them. Whatever the file does state has no default: a missing
key is an error.

Source: transformers `Qwen2VLImageProcessor`, `Qwen2VLVideoProcessor`, `WhisperFeatureExtractor`, and the class
attributes of `Qwen3OmniMoeProcessor`; the two frames per second are the official recipe's (qwen-omni-utils).
"""

from dataclasses import dataclass, replace

from omni_jax.errors import ConfigError
from omni_jax.reader import Reader

SAMPLING_RATE = 16_000  # samples per second; the encoder was trained on nothing else
CHANNELS = 3

# Qwen3OmniMoeProcessor.videos_kwargs["size"]: the area of a resized frame, in pixels.
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 128 * 32 * 32, 768 * 32 * 32
VIDEO_FRAMES_PER_SECOND = 2.0
VIDEO_MIN_FRAMES, VIDEO_MAX_FRAMES = 4, 768
# qwen-omni-utils: nine tenths of a context of 128,000, shared by the frames of a video; and a picture with options.
VIDEO_TOTAL_TOKENS = 115_200
PICTURE_MIN_TOKENS, PICTURE_MAX_TOKENS = 4, 16_384


def _reader(values: dict) -> Reader:
    return Reader(values, "", "preprocessor_config.json")


def _channels(r: Reader, name: str) -> tuple[float, ...]:
    numbers = r.get(name, (list, tuple))
    if len(numbers) != CHANNELS or not all(isinstance(x, (int, float)) for x in numbers):
        raise ConfigError(f"{r.where(name)} is {numbers!r}, not {CHANNELS} numbers")
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
        r = _reader(values)
        for name, allowed in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
            r.expect(name, allowed)
        settings = cls(
            min_pixels=r.count("min_pixels"),
            max_pixels=r.count("max_pixels"),
            patch_size=r.count("patch_size"),
            temporal_patch_size=r.count("temporal_patch_size"),
            merge_size=r.count("merge_size"),
            mean=_channels(r, "image_mean"),
            std=_channels(r, "image_std"),
        )
        if 0.0 in settings.std:
            raise ConfigError(f"{r.where('image_std')} holds a zero")
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
        r = _reader(values)
        for name, allowed in (("sampling_rate", SAMPLING_RATE), ("dither", 0.0), ("padding_value", 0.0)):
            r.expect(name, allowed)
        return cls(
            mel_bins=r.count("feature_size"),
            n_fft=r.count("n_fft"),
            hop_samples=r.count("hop_length"),
        )
