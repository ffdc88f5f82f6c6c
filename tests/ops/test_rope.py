"""Multimodal rope against transformers, and rotation by hand."""

import numpy as np
import pytest

from omni_jax.decoder_config import RopeConfig
from omni_jax.ops.rope import rope, rotate


@pytest.mark.parametrize("section", [(24, 20, 20), (8, 4, 4), (6, 5, 1)])
def test_interleaved_rope_is_that_of_transformers(section: tuple[int, int, int]) -> None:
    import torch
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as hf
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig

    H = 2 * sum(section)
    parameters = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": list(section)}
    reference = hf.Qwen3OmniMoeThinkerTextRotaryEmbedding(
        Qwen3OmniMoeTextConfig(head_dim=H, rope_parameters=parameters)
    )
    positions = np.random.default_rng(0).uniform(0, 900, (3, 2, 11)).astype(np.float32)
    want = [a.numpy() for a in reference(torch.zeros(1), torch.tensor(positions))]
    got = rope(positions, H, RopeConfig(5e5, section), np.float32)
    # Angles reach 900 radians, where one unit in the last place is 6e-5.
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_plain_positions_equal_three_equal_ones() -> None:
    positions = np.arange(7, dtype=np.float32)[None]
    plain = rope(positions, 16, RopeConfig(1e4, (4, 2, 2)), np.float32)
    three = rope(np.repeat(positions[None], 3, 0), 16, RopeConfig(1e4, (4, 2, 2)), np.float32)
    np.testing.assert_array_equal(plain, three)


def test_rotation_keeps_lengths_and_depends_on_differences() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 2, 8)).astype(np.float32)
    scores = []
    for shift in (0.0, 31.0):
        angles = [rope(np.array([[p + shift]], np.float32), 8, RopeConfig(1e4, None), np.float32) for p in (3, 9)]
        scores.append(np.sum(rotate(q, *angles[0]) * rotate(k, *angles[1]), -1))
        np.testing.assert_allclose(np.sum(rotate(q, *angles[0]) ** 2, -1), np.sum(q**2, -1), rtol=1e-5)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
