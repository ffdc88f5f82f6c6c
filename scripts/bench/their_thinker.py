"""Transformers' Thinker as it is measured."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from scripts.bench.options import Run
from scripts.bench.system import their_device
from scripts.small.configs import config_dict


def their_thinker(run: Run, directory: Path | None) -> tuple[Any, str]:
    """Transformers' Thinker from a checkpoint or with random weights, and the device that it is on."""
    dtype, device = getattr(torch, run.dtype), their_device(run.threads)
    if directory is None:
        thinker_config: Any = Qwen3OmniMoeConfig(**config_dict(run.shape)).thinker_config
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return Qwen3OmniMoeThinkerForConditionalGeneration(thinker_config).eval(), device
    whole: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(directory, dtype=dtype)
    return whole.thinker.to(device).eval(), device
