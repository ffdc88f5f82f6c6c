"""The positions of transformers, without building a model: get_rope_index needs only a configuration."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def rope_index(
    thinker_config: dict,
    ids: Any,
    mask: Any,
    images: Any = None,
    videos: Any = None,
    seconds_per_grid: Any = None,
    mel_frames: Any = None,
    use_audio_in_video: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions float32 [3, B, T] and deltas [B] of padded ids [B, T]; media in batch order, None if absent."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_omni_moe import configuration_qwen3_omni_moe as configuration
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as modeling

    cls = modeling.Qwen3OmniMoePreTrainedModelForConditionalGeneration
    config = configuration.Qwen3OmniMoeThinkerConfig(**thinker_config)
    model = SimpleNamespace(config=config, spatial_merge_size=config.vision_config.spatial_merge_size)
    model.get_llm_pos_ids_for_vision = cls.get_llm_pos_ids_for_vision.__get__(model)
    tensors = [None if x is None else torch.as_tensor(x) for x in (ids, images, videos, mask)]
    more = [None if x is None else torch.as_tensor(x) for x in (mel_frames, seconds_per_grid)]
    positions, deltas = cls.get_rope_index(model, *tensors, use_audio_in_video, *more)
    return positions.numpy().astype(np.float32), deltas.numpy()[:, 0]
