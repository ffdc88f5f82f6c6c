"""First layers that suit what they are given: scaled convolutions of sounds, whitened tokens and patches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.models.audio import AudioEncoder
from omni_jax.models.param import bind, declare
from omni_jax.train.batch import MediaRows
from scripts.nano.begin import drawn
from scripts.nano.config import nano_config, nano_tokenizer
from scripts.nano.senses import wordings
from scripts.nano.whiten import whitened, whitening
from scripts.small.tensors import tensor_shapes


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return nano_config(nano_tokenizer(wordings()))


@pytest.fixture(scope="module")
def tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    shapes = tensor_shapes(config)
    return {name: drawn(name, shape, 0) for name, shape in shapes.items() if "audio_tower" in name or "patch" in name}


@pytest.fixture(scope="module")
def media() -> MediaRows:
    """16 windows [16, 2, 128, 100] without the last chunk, and 40 frames [40, 16, 1536], eight of 4 patches alone."""
    draw = np.random.default_rng(0)
    loud = draw.uniform(-1, 1, (16, 2, 1, 1)) - 0.5
    mel = (loud + 0.3 * np.sin(np.arange(128)[:, None] * draw.uniform(0, 1, (16, 2, 1, 100)))).astype(np.float32)
    width = np.full((16, 2), 100, np.int32)
    width[-1, 1] = 0
    bright = draw.uniform(-1, 1, (40, 1, 1)) + 0.5
    patches = (bright + 0.1 * draw.standard_normal((40, 16, 1536))).astype(np.float32)
    grid = np.full((40, 2), 4, np.int32)
    grid[:8], patches[:8, 4:] = 2, 0
    index = np.zeros((1, 1), np.int32)
    return MediaRows(vision=((patches, grid),), audio=(mel, width, width), visual_index=index, audio_index=index)


def test_a_whitened_layer_gives_uncorrelated_numbers() -> None:
    draw = np.random.default_rng(1)
    x = draw.standard_normal((4000, 12)) * np.geomspace(10, 1, 12) @ draw.standard_normal((12, 12)) + 5
    weight, bias = whitening(draw, x, 6, without_mean=False)
    made = x @ weight.T + bias
    assert np.abs(made.mean(0)).max() < 1e-3 and np.abs(np.cov(made.T) - np.eye(6)).max() < 0.1
    blind, _ = whitening(draw, x, 6, without_mean=True)
    assert np.abs(blind @ x.mean(0)).max() < 1e-4


def test_sounds_differ_more_after_the_whitened_layers(
    config: dict[str, Any], tensors: dict[str, np.ndarray], media: MediaRows
) -> None:
    """The encoder's own convolutions: what all tokens have in common is small, every channel has mean 0."""
    made = whitened(tensors, [media], 0)
    assert made.keys() == tensors.keys()
    assert all(made[name].shape == x.shape and made[name].dtype == np.float32 for name, x in tensors.items())
    assert media.audio is not None
    mel = jnp.asarray(media.audio[0]).reshape(-1, 128, 100)[:-1]

    def shared(of: dict[str, np.ndarray]) -> float:
        tokens = convolved(config, of, mel).reshape(-1, of["thinker.audio_tower.conv_out.weight"].shape[0])
        return float(np.square(tokens.mean(0)).mean() / np.square(tokens).mean())

    assert shared(made) < 1e-3 < 0.3 < shared(tensors)
    tokens = convolved(config, made, mel)
    assert np.square(tokens).mean() == pytest.approx(1, rel=0.01)


def convolved(config: dict[str, Any], tensors: dict[str, np.ndarray], mel: jax.Array) -> np.ndarray:
    """Tokens [chunks, 13, width] of mel [chunks, bins, frames] before the blocks."""
    from omni_jax.config import OmniConfig

    audio = OmniConfig.from_hf(config).thinker.audio
    declaration = declare(lambda rngs: AudioEncoder(rngs, audio))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), declaration.shapes)
    for i in (1, 2, 3):
        names = ("weight", "bias")
        params[f"conv{i}"] = {name: jnp.asarray(tensors[f"thinker.audio_tower.conv2d{i}.{name}"]) for name in names}
    params["conv_out"] = {"weight": jnp.asarray(tensors["thinker.audio_tower.conv_out.weight"])}
    encoder = bind(declaration, params)
    return np.asarray(jax.vmap(encoder._embed_chunk)((mel, jnp.full(len(mel), mel.shape[2]))))


def test_padding_of_frames_is_not_seen(tensors: dict[str, np.ndarray], media: MediaRows) -> None:
    name = "thinker.visual.patch_embed.proj"
    (patches, grid), *_ = media.vision
    real = np.concatenate([frame[: h * w] for frame, (h, w) in zip(np.asarray(patches), np.asarray(grid), strict=True)])
    made = whitened(tensors, [media], 0)
    out = real @ made[f"{name}.weight"].reshape(64, -1).T + made[f"{name}.bias"]
    assert np.abs(out.mean(0)).max() < 1e-2 and np.square(out).mean() == pytest.approx(1, rel=0.01)


def test_what_is_not_given_stays(tensors: dict[str, np.ndarray], media: MediaRows) -> None:
    seen = MediaRows(media.vision, None, media.visual_index, media.audio_index)
    made = whitened(tensors, [seen], 0)
    changed = {name for name, x in tensors.items() if not np.array_equal(made[name], x)}
    assert changed == {f"thinker.visual.patch_embed.proj.{one}" for one in ("weight", "bias")}
