"""What both models are given: conversations for ours, the ids and media features of those for transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.inputs.audio import load_audio, log_mel
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.image import load_image, patchify_image
from omni_jax.inputs.processor import Processor
from omni_jax.inputs.video import load_video, patchify_video, video_audio

RATE = 16_000


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random picture, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(3, 40) + y / rng.uniform(3, 40) + rng.uniform(0, 6)) for _ in range(3)]
    return ((np.stack(waves, -1) + 1) * 127).astype(np.uint8)


def clip(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames that all differ, uint8 [frames, height, width, 3]."""
    return np.stack([picture(height, width, seed * 100 + t) for t in range(frames)])


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """A chirp with noise, float32 [samples] at 16 kHz."""
    t = np.arange(round(seconds * RATE)) / RATE
    rng = np.random.default_rng(seed)
    wave = 0.3 * np.sin(2 * np.pi * (200 + 150 * seed) * t * (1 + 0.2 * t)) + 0.05 * rng.standard_normal(t.size)
    return wave.astype(np.float32)


def image_part(height: int, width: int, seed: int = 0) -> dict:
    return {"type": "image", "image": picture(height, width, seed)}


def video_part(frames: int, height: int, width: int, fps: float = 2.0, seed: int = 0) -> dict:
    return {"type": "video", "video": clip(frames, height, width, seed), "fps": fps}


def audio_part(seconds: float, seed: int = 0) -> dict:
    return {"type": "audio", "audio": sound(seconds, seed), "sampling_rate": RATE}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict | str) -> list[dict]:
    """A conversation of one turn."""
    return [{"role": "user", "content": [text_part(p) if isinstance(p, str) else p for p in parts]}]


@dataclass
class _Gathered:
    images: list
    videos: list
    seconds: list
    mels: list


def reference_inputs(
    processor: Processor, conversations: Sequence[list[dict]], batch: Batch, use_audio_in_video: bool = False
) -> dict[str, Any]:
    """Keyword arguments of transformers' Thinker for the ids of `batch`; it computes its positions itself."""
    import torch

    found = _Gathered([], [], [], [])
    for conversation in conversations:
        for message in conversation:
            for part in message["content"] if isinstance(message["content"], list) else []:
                _gather(processor, part, found, use_audio_in_video)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(batch.token_ids).long(),
        "attention_mask": torch.tensor(batch.mask).long(),
    }
    for name, grid_name, items in (
        ("pixel_values", "image_grid_thw", found.images),
        ("pixel_values_videos", "video_grid_thw", found.videos),
    ):
        if items:
            inputs[name] = torch.tensor(np.concatenate([patches for patches, _ in items]))
            inputs[grid_name] = torch.tensor([grid for _, grid in items])
    if found.videos:
        inputs["video_second_per_grid"] = torch.tensor(found.seconds)
    if found.mels:
        longest = max(mel.shape[1] for mel in found.mels)
        inputs["input_features"] = torch.tensor(
            np.stack([np.pad(mel, ((0, 0), (0, longest - mel.shape[1]))) for mel in found.mels])
        )
        inputs["feature_attention_mask"] = torch.tensor(
            np.stack([np.arange(longest) < mel.shape[1] for mel in found.mels])
        ).long()
    if use_audio_in_video:
        inputs["use_audio_in_video"] = True
    return inputs


def _gather(processor: Processor, part: dict, found: _Gathered, use_audio_in_video: bool) -> None:
    if part["type"] == "image":
        found.images.append(patchify_image(load_image(part["image"]), processor.image_settings))
    elif part["type"] == "audio":
        found.mels.append(log_mel(load_audio(part["audio"], part.get("sampling_rate")), processor.audio_settings))
    elif part["type"] == "video":
        video = load_video(part["video"], processor.video_settings, part.get("fps"))
        patches, grid, seconds = patchify_video(video, processor.video_settings)
        found.videos.append((patches, grid))
        found.seconds.append(seconds)
        if use_audio_in_video and isinstance(part["video"], str | Path):
            track = video_audio(part["video"])
            if track is not None:
                found.mels.append(log_mel(track, processor.audio_settings))
