"""Norms of one row, which add up in another way, and of several."""

import jax
import numpy as np
import pytest

from omni_jax.ops.norm import rms_norm

EPS = 1e-3


@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 1000), (3, 48), (2, 3, 1000)])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 1e4])
def test_a_norm_is_that_of_double_precision(shape: tuple[int, ...], scale: float) -> None:
    draw = np.random.default_rng(0)
    x, weight = np.float32(scale * draw.normal(size=shape)), np.float32(draw.normal(size=shape[-1]))
    exact = weight * x / np.sqrt(np.mean(np.float64(x) ** 2, axis=-1, keepdims=True) + EPS)
    np.testing.assert_allclose(jax.jit(rms_norm)(x, weight, EPS), exact, rtol=1e-6)
