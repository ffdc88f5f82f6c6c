"""The vocoder of a small checkpoint beside transformers'."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch

from omni_jax.config import Code2WavConfig
from omni_jax.models.param import Declaration, bind


@dataclass(frozen=True)
class Case:
    """One checkpoint's vocoder, here and in transformers."""

    config: Code2WavConfig
    params: dict
    declaration: Declaration
    reference: Any

    @property
    def model(self) -> tuple[dict, Declaration, Code2WavConfig]:
        return self.params, self.declaration, self.config

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """call(module, *args), compiled."""
        return jax.jit(lambda params, *args: call(bind(self.declaration, params), *args))(self.params, *args)

    def codes(self, *frames: int, rows: int = 1, seed: int = 0) -> np.ndarray:
        """Random codes [rows, Q, frames]."""
        rng = np.random.default_rng(seed)
        return rng.integers(0, self.config.codebook_size, (rows, self.config.num_quantizers, *frames))

    def theirs(self, codes: np.ndarray, *cut: int) -> np.ndarray:
        """The reference's samples [B, samples]: of whole codes, or by chunks and context."""
        with torch.no_grad():
            decode = self.reference.chunked_decode if cut else self.reference
            return decode(torch.tensor(codes), *cut)[:, 0].numpy()
