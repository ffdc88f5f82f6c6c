"""The whole preprocessing of transformers, and what it is given."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


@dataclass
class Asked:
    """What transformers' processor is given for a batch of conversations."""

    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    grids: list = field(default_factory=list)
    fps: set = field(default_factory=set)
    sounds: list = field(default_factory=list)
    sources: list = field(default_factory=list)


def theirs(directory, config, asked, rows, use_audio_in_video=False):
    """The output of Qwen3OmniMoeProcessor, left padded; its video processor, which needs torchvision, is a stub."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Reference(transformers.Qwen3OmniMoeProcessor):
        def check_argument_for_proper_class(self, *_):
            pass

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "video_processor", "feature_extractor", "tokenizer"]

    class Grids(SimpleNamespace):
        def __call__(self, videos, size, **_):
            limits = [size["shortest_edge"], size["longest_edge"]]
            return {"video_grid_thw": np.array(self.grids), "video_limits": np.array(limits)}

    thinker = config["thinker_config"]
    vision = thinker["vision_config"]
    reference = Reference(
        Qwen2VLImageProcessorPil.from_pretrained(directory),
        Grids(
            grids=asked.grids,
            temporal_patch_size=vision["temporal_patch_size"],
            merge_size=vision["spatial_merge_size"],
        ),
        transformers.WhisperFeatureExtractor.from_pretrained(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
        chat_template=(directory / "chat_template.jinja").read_text(),
    )
    reference.n_window = thinker["audio_config"]["n_window"]
    reference.position_id_per_seconds = thinker["position_id_per_seconds"]
    prompts = [reference.apply_chat_template(row, add_generation_prompt=True) for row in rows]
    options = {}
    if use_audio_in_video:
        options = {"load_audio_from_video": True, "audio_from_video_indices": asked.sources}
    return reference(
        text=prompts,
        images=asked.images or None,
        videos=asked.videos or None,
        audio=asked.sounds or None,
        fps=next(iter(asked.fps), None),
        padding=True,
        return_tensors="np",
        **options,
    )


def patches_at(batch, b, merge):
    """The patches float32 [n, patch_dim] that the visual tokens of row b lead to, in order."""
    tokens = [rows.patches.reshape(-1, merge**2, rows.patches.shape[-1]) for rows in batch.vision]
    index = batch.visual_index[b][batch.visual_index[b] >= 0]
    return np.concatenate(tokens)[index].reshape(-1, tokens[0].shape[-1])
