"""Speech to codes by the Mimi codec, whose encoder is public.

Public reports say that Qwen3-Omni's codes are the first 16 codebooks of Mimi (2048 codes each, 12.5 frames per second,
24 kHz); Qwen does not say so. Encode a file, decode it with `omni-jax train check-codes` and listen, before you train.

Source: transformers `MimiModel`, with weights such as "kyutai/mimi". Needs torch and transformers.
"""

from functools import cache
from typing import Any

import numpy as np

from omni_jax.errors import InputError

CODEBOOKS = 16
MODEL = "kyutai/mimi"


def encode(samples: np.ndarray, rate: int, model: str = MODEL, codebooks: int = CODEBOOKS) -> np.ndarray:
    """Samples float32 [n], `rate` of them per second, to codes int64 [Q, F].

    model: where the codec is, a directory or a model id. codebooks: Q, the first ones of the codec.
    """
    codec = _codec(model)
    import soxr
    import torch

    wanted = codec.config.sampling_rate
    samples = samples if rate == wanted else soxr.resample(samples, rate, wanted, "HQ")
    with torch.no_grad():
        found = codec.encode(torch.from_numpy(np.ascontiguousarray(samples))[None, None], num_quantizers=codebooks)
    return found.audio_codes[0].numpy()


@cache
def _codec(model: str) -> Any:
    try:
        from transformers import MimiModel
    except ImportError as error:
        raise InputError("the Mimi codec needs torch and transformers; pip install torch transformers") from error
    try:
        return MimiModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"{model}: no Mimi codec can be loaded from it; download kyutai/mimi, or check the path"
        ) from error
