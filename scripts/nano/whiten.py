"""The first layers of the encoders before training: what they give of real rows is as wide in all directions.

Log-mel frames and pictures differ most in what matters least, loudness and brightness; after random layers every sound
is almost the same as the next, and training spends its steps on telling them apart. So each convolution of sounds is
scaled to give every channel mean 0 and variance 1, and the linear layers behind it and before the blocks of vision turn
their inputs to uncorrelated numbers (whitening).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.models.audio import NUM_CONVS, halve
from omni_jax.ops.gelu import gelu_exact
from omni_jax.train.batch import MediaRows

AUDIO, PATCHES = "thinker.audio_tower", "thinker.visual.patch_embed.proj"
# Directions of little variance are not blown up: this share of the mean of the ten widest is added to all.
FLOOR, WIDEST = 0.01, 10

Tensors = dict[str, np.ndarray]


def whitened(tensors: Mapping[str, np.ndarray], media: Sequence[MediaRows], seed: int) -> Tensors:
    """The tensors [...] of a checkpoint with first layers that suit `media`; without media of a kind, as they are."""
    sounds = [rows.audio for rows in media if rows.audio is not None]
    patches = [
        np.asarray(patches[: height * width])
        for rows in media
        for group in rows.vision
        for patches, (height, width) in zip(*group, strict=True)
    ]
    made = dict(tensors)
    if sounds:
        made |= _audio_layers(tensors, np.random.default_rng([seed, 1]), sounds)
    if patches:
        made |= _patch_layer(tensors, np.random.default_rng([seed, 2]), np.concatenate(patches))
    return made


def whitening(
    draw: np.random.Generator, x: np.ndarray, outputs: int, without_mean: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A linear layer that makes `outputs` uncorrelated numbers of x [samples, inputs]: weight, bias, float32.

    Its numbers have together the mean square 1. Without a bias, it is blind to the direction of the mean of x.
    """
    mean = x.mean(0, dtype=np.float64)
    seen = np.eye(len(mean)) - (np.outer(mean, mean) / (mean @ mean) if without_mean else 0)
    values, directions = np.linalg.eigh(seen @ np.cov(x.T) @ seen)
    values, directions = values[::-1][:outputs], directions[:, ::-1][:, :outputs]
    turned, _ = np.linalg.qr(draw.standard_normal((outputs, outputs)))
    weight = turned @ (directions / np.sqrt(values + FLOOR * values[:WIDEST].mean())).T @ seen
    weight /= np.sqrt(np.square((x - mean) @ weight.T).mean())
    return weight.astype(np.float32), -(weight @ mean).astype(np.float32)


def _audio_layers(tensors: Mapping[str, np.ndarray], draw: np.random.Generator, sounds: Sequence[tuple]) -> Tensors:
    """The convolutions and `conv_out` for windows mel [W, C, M, F] with their widths [W, C]."""
    x = jnp.concatenate([jnp.asarray(mel).reshape(-1, 1, *mel.shape[2:]) for mel, _, _ in sounds])
    width: Any = np.concatenate([np.asarray(width).reshape(-1) for _, _, width in sounds])
    x, width = x[width > 0], width[width > 0]
    made: Tensors = {}
    for i in range(1, NUM_CONVS + 1):
        name = f"{AUDIO}.conv2d{i}"
        y = jax.lax.conv_general_dilated(x, jnp.asarray(tensors[f"{name}.weight"]), (2, 2), ((1, 1), (1, 1)))
        width = halve(width)
        real = (np.arange(y.shape[3]) < width[:, None])[:, None, None]
        count = real.sum() * y.shape[2]
        mean = jnp.where(real, y, 0).sum((0, 2, 3), keepdims=True) / count
        scale = jnp.sqrt(jnp.where(real, jnp.square(y - mean), 0).sum((0, 2, 3), keepdims=True) / count)
        made[f"{name}.weight"] = np.asarray(tensors[f"{name}.weight"] / scale.reshape(-1, 1, 1, 1))
        made[f"{name}.bias"] = np.asarray(-mean / scale).reshape(-1)
        x = jnp.where(real, gelu_exact((y - mean) / scale), 0)
    steps = np.asarray(x.transpose(0, 3, 1, 2)).reshape(len(x), x.shape[3], -1)
    heard = steps[np.arange(steps.shape[1]) < width[:, None]]
    name = f"{AUDIO}.conv_out.weight"
    made[name], _ = whitening(draw, heard, len(tensors[name]), without_mean=True)
    return made


def _patch_layer(tensors: Mapping[str, np.ndarray], draw: np.random.Generator, patches: np.ndarray) -> Tensors:
    """The layer of patches [patches, channels * frames * height * width]."""
    shape = tensors[f"{PATCHES}.weight"].shape
    weight, bias = whitening(draw, patches, shape[0], without_mean=False)
    return {f"{PATCHES}.weight": weight.reshape(shape), f"{PATCHES}.bias": bias}
