"""Adapters of `peft` on the Thinkers of small checkpoints, with random factors, and what such a model computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3OmniMoeForConditionalGeneration

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
ENCODERS = r".*\.?(visual|audio_tower)\..*"
TOKENS = np.array([[5, 8, 13, 100, 44, 2, 77, 31, 9, 400, 3]], np.int32)


def fresh(checkpoint: Path) -> Any:
    """The whole transformers model of a checkpoint, of its own for each call: `peft` changes what it wraps."""
    torch.set_num_threads(1)
    return Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def wrap(model: Any, seed: int = 0, **settings: Any) -> Any:
    """`model` with an adapter of these settings, all of whose factors are random."""
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"exclude_modules": ENCODERS, **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, factor in wrapped.named_parameters():
            if "lora_" in name:
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.3 * factor.shape[1] ** -0.5)
    return wrapped.eval()


def logits(thinker: Callable[..., Any], token_ids: np.ndarray = TOKENS) -> np.ndarray:
    with torch.no_grad():
        return thinker(input_ids=torch.tensor(token_ids, dtype=torch.long)).logits.float().numpy()
