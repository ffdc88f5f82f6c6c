"""How media become patches and mel frames: the settings that a checkpoint states in `preprocessor_config.json`.

The file describes images and audio; the reference's processor class adds the size limits and the sampling of videos,
which are named constants here. It passes its limits at every call, so that neither this file nor
`video_preprocessor_config.json` changes them; the one file that does is `tokenizer_config.json`, whose "size", which no
public checkpoint has, holds for pictures and frames alike. What the files do state has no default: a missing key is an
error. The types of the fields state keys and ranges, and `from_hf` checks the relations between the numbers.

Checkpoints that transformers 5 has saved again have `processor_config.json` instead, with a section for each medium and
the limits as `size`.

Source: transformers `Qwen2VLImageProcessor`, `Qwen2VLVideoProcessor`, `WhisperFeatureExtractor`, the class attributes
of `Qwen3OmniMoeProcessor`, and `ProcessorMixin._merge_kwargs`, which puts the tokenizer's settings above them; the two
frames per second are the official recipe's (qwen-omni-utils).
"""

from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any

from omni_jax.files import read_object
from omni_jax.reader import Range, Reader, Size

SAMPLING_RATE = 16_000  # samples per second; the only rate that the encoder was trained on
CHANNELS = 3
FILE, SAVED, TOKENIZER = "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"

# Qwen3OmniMoeProcessor.videos_kwargs["size"]: the area of a resized frame, in pixels.
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 128 * 32 * 32, 768 * 32 * 32
VIDEO_FRAMES_PER_SECOND = 2.0
VIDEO_MIN_FRAMES, VIDEO_MAX_FRAMES = 4, 768
# qwen-omni-utils: nine tenths of a context of 128,000, shared by the frames of a video; limits of a picture with
# options.
VIDEO_TOTAL_TOKENS = 115_200
PICTURE_MIN_TOKENS, PICTURE_MAX_TOKENS = 4, 16_384


def read_settings(directory: Path) -> tuple[dict[str, Any], str]:
    """What a checkpoint states about media, parsed but not checked, and the name of the file that states it."""
    name = SAVED if isfile(directory / SAVED) and not isfile(directory / FILE) else FILE
    values = read_object(directory / name, remedy="copy it from the original checkpoint")
    if name == SAVED:
        r = Reader(values, "", name)
        # The section of sound repeats outdated limits of pictures; those in the pictures' own section are valid.
        limits = {"min_pixels": None, "max_pixels": None}
        values = {**r.section("feature_extractor").values, **limits, **r.section("image_processor").values}
    return values, name


@dataclass(frozen=True)
class SizeLimits:
    """The area of a resized picture or frame, in pixels."""

    min_pixels: Annotated[int, Range(1, 10**8), "shortest_edge"]
    max_pixels: Annotated[int, Range(1, 10**9), "longest_edge"]

    @classmethod
    def from_dir(cls, directory: Path) -> "SizeLimits | None":
        """The "size" in `tokenizer_config.json`, if it is there; raise ConfigError for one that is not two areas."""
        if not isfile(directory / TOKENIZER):
            return None
        r = Reader(read_object(directory / TOKENIZER), "", TOKENIZER)
        return cls(**r.section("size").fields(cls)) if r.has("size") else None


@dataclass(frozen=True)
class ImageSettings:
    """Size limits (pixels of a resized picture), normalisation (per channel, on values of 0 to 1) and patch sizes."""

    min_pixels: Annotated[int, Range(1, 10**8)]
    max_pixels: Annotated[int, Range(1, 10**9)]
    patch_size: Size
    temporal_patch_size: Size
    merge_size: Size
    mean: Annotated[tuple[float, float, float], Range(-5, 5), "image_mean"]
    std: Annotated[tuple[float, float, float], Range(0.01, 10), "image_std"]

    @property
    def factor(self) -> int:
        """Pixels that a side must be a multiple of: one merged token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch row: channels x frames x height x width."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_hf(cls, values: dict, file: str = FILE) -> "ImageSettings":
        """Read a parsed `preprocessor_config.json`; raise ConfigError naming the key that is missing or unsupported."""
        r = Reader(values, "", file)
        if r.has("size") and not r.has("min_pixels"):
            least, most = (r.section("size").get(name, int) for name in ("shortest_edge", "longest_edge"))
            r = Reader({**values, "min_pixels": least, "max_pixels": most}, "", file)
        for name in ("do_resize", "do_rescale", "do_normalize"):
            r.expect(name, True)
        r.expect("resample", 3)
        r.expect("rescale_factor", 1 / 255)
        return cls(**r.fields(cls)).checked(file)

    def within(self, limits: SizeLimits) -> "ImageSettings":
        """These settings with the limits of a tokenizer's "size"; raise ConfigError if they leave no size."""
        return replace(self, **vars(limits)).checked(TOKENIZER)

    def checked(self, file: str) -> "ImageSettings":
        """These settings; raise ConfigError naming the file if the limits, which it states, leave no size."""
        least, most, token = self.min_pixels, self.max_pixels, self.factor**2
        Reader({}, "", file).require(
            (least <= most, f"min_pixels {least} exceeds max_pixels {most}"),
            (token <= most, f"max_pixels {most} is less than one token of {token} pixels (patch_size x merge_size)"),
        )
        return self


@dataclass(frozen=True)
class VideoSettings:
    """How a video is sampled (frames per second, fewest and most frames) and how each frame becomes patches."""

    frame: ImageSettings
    frames_per_second: float
    min_frames: int
    max_frames: int

    @classmethod
    def from_hf(cls, values: dict, file: str = FILE) -> "VideoSettings":
        """Read a parsed `preprocessor_config.json`; size limits and sampling of videos are the constants above."""
        frame = replace(ImageSettings.from_hf(values, file), min_pixels=VIDEO_MIN_PIXELS, max_pixels=VIDEO_MAX_PIXELS)
        return cls(frame, VIDEO_FRAMES_PER_SECOND, VIDEO_MIN_FRAMES, VIDEO_MAX_FRAMES)

    def within(self, limits: SizeLimits) -> "VideoSettings":
        """These settings with the limits of a tokenizer's "size"."""
        return replace(self, frame=self.frame.within(limits))


@dataclass(frozen=True)
class AudioSettings:
    """The log-mel spectrogram: mel bins, and the Fourier window and its hop in samples at 16 kHz."""

    mel_bins: Annotated[int, Range(1, 2_000), "feature_size"]
    n_fft: Annotated[int, Range(2, 10_000)]
    hop_samples: Annotated[int, Range(40, 10_000), "hop_length"]

    @classmethod
    def from_hf(cls, values: dict, file: str = FILE) -> "AudioSettings":
        """Read a parsed `preprocessor_config.json`; raise ConfigError naming the key that is missing or unsupported."""
        r = Reader(values, "", file)
        for name, allowed in (("sampling_rate", SAMPLING_RATE), ("dither", 0.0), ("padding_value", 0.0)):
            r.expect(name, allowed)
        settings = cls(**r.fields(cls))
        bins, window, hop = settings.mel_bins, settings.n_fft, settings.hop_samples
        r.require(
            (bins <= window // 2, f"n_fft {window} gives too few frequencies for feature_size {bins}"),
            (hop <= window, f"hop_length {hop} exceeds n_fft {window}, so samples between two windows are lost"),
        )
        return settings
