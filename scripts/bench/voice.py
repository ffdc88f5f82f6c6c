"""What both systems are asked to speak, and how."""

from typing import Any

import numpy as np

from scripts.bench.options import Speech

SPEAKER = "ethan"
TEMPERATURE, TOP_K, PENALTY = 0.9, 50, 1.05


def spoken_prompts(options: Speech, config: Any) -> np.ndarray:
    """A user's turn of random ordinary tokens and the header of the answer, int64 [B, T]."""
    ids = np.random.default_rng(0).integers(0, 200, (options.batch, options.prompt))
    ids[:, :2] = config.im_start_token_id, config.user_token_id
    ids[:, -4:-1] = config.im_end_token_id, config.im_start_token_id, config.assistant_token_id
    return ids
