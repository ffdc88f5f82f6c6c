"""The vocoder's convolutions and activation against torch, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeSnakeBeta

from omni_jax.ops import conv
from omni_jax.ops.conv import causal_conv, conv_to_mono, conv_transpose, depthwise_conv, sin_squared, snake

TOLERANCE = 1e-5


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 1)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x.transpose(0, 2, 1))


@pytest.mark.parametrize("k,dilation,channels,out", [(7, 1, 5, 3), (7, 3, 4, 6), (7, 9, 8, 8), (2, 5, 3, 2)])
def test_causal_conv_is_torchs_without_padding(k: int, dilation: int, channels: int, out: int) -> None:
    x, weight = normal(2, 70, channels), normal(out, channels, k, seed=1)
    want = torch.nn.functional.conv1d(channels_first(x), torch.tensor(weight), dilation=dilation)
    np.testing.assert_allclose(causal_conv(x, weight, dilation), channels_last(want), atol=TOLERANCE)


@pytest.mark.parametrize("rows,out,turned", [(2, 17, True), (2, 16, False), (4, 17, False)])
def test_a_large_weight_is_not_turned(rows: int, out: int, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU, where a convolution's library turns it: then its inputs are, if they are fewer."""
    x, weight = normal(rows, 8 + 6 * 3, 5), normal(out, 5, 7, seed=1)
    monkeypatch.setattr(conv, "platform", lambda: "cuda")
    assert ("conv_general_dilated" in str(jax.make_jaxpr(causal_conv, static_argnums=2)(x, weight, 3))) != turned
    want = torch.nn.functional.conv1d(channels_first(x), torch.tensor(weight), dilation=3)
    np.testing.assert_allclose(causal_conv(x, weight, 3), channels_last(want), atol=TOLERANCE)


@pytest.mark.parametrize("k,channels", [(7, 5), (3, 1)])
def test_depthwise_conv_keeps_channels_apart(k: int, channels: int) -> None:
    x, weight = normal(2, 30, channels), normal(channels, 1, k, seed=1)
    want = torch.nn.functional.conv1d(channels_first(x), torch.tensor(weight), groups=channels)
    np.testing.assert_allclose(depthwise_conv(jnp.asarray(x), weight), channels_last(want), atol=TOLERANCE)


@pytest.mark.parametrize("k,channels", [(7, 5), (2, 1)])
def test_conv_to_mono_is_a_convolution_to_one_channel(k: int, channels: int) -> None:
    x, weight = normal(2, 30, channels), normal(1, channels, k, seed=1)
    want = torch.nn.functional.conv1d(channels_first(x), torch.tensor(weight))
    np.testing.assert_allclose(conv_to_mono(x, weight), want[:, 0], atol=TOLERANCE)


@pytest.mark.parametrize("channels", [4, 19])
@pytest.mark.parametrize("stride,look_back", [(3, 1), (8, 1), (1, 1), (2, 0), (5, 0), (2, 2)])
def test_conv_transpose_is_torchs_trimmed_on_both_sides(stride: int, look_back: int, channels: int) -> None:
    """For fewer channels than inputs, of which there are 18, and for more: then the weight is used as it lies."""
    x, weight = normal(2, 9, channels), normal(channels, 3, stride * (look_back + 1), seed=1)
    turned = "transpose[" in str(jax.make_jaxpr(lambda w: conv_transpose(x, w, stride).sum())(weight)).split("dot_")[0]
    assert turned == (channels < 18)
    want = torch.nn.functional.conv_transpose1d(channels_first(x), torch.tensor(weight), stride=stride)
    trim = stride * look_back
    want = channels_last(want)[:, trim : want.shape[2] - trim]
    np.testing.assert_allclose(conv_transpose(x, weight, stride), want, atol=TOLERANCE)


def test_snake_is_the_references() -> None:
    x, theirs = 3 * normal(2, 40, 6), Qwen3OmniMoeSnakeBeta(6)
    with torch.no_grad():
        theirs.alpha.copy_(torch.tensor(normal(6, seed=1)))
        theirs.beta.copy_(torch.tensor(normal(6, seed=2)) - 1)
        want = channels_last(theirs(channels_first(x)))
    np.testing.assert_allclose(snake(x, *(p.detach().numpy() for p in (theirs.alpha, theirs.beta))), want, atol=3e-6)


@pytest.mark.parametrize("beta", [-30.0, 0.0])
def test_snake_never_divides_by_nothing(beta: float) -> None:
    x = np.full((1, 1, 1), 1e-6, np.float32)
    want = 1e-6 + np.sin(1e-6) ** 2 / (np.exp(beta) + 1e-9)
    np.testing.assert_allclose(snake(x, np.zeros(1, np.float32), np.full(1, beta, np.float32)), want, rtol=1e-4)


@pytest.mark.parametrize("limit,tolerance", [(1.6, 3e-7), (1000.0, 4e-7)])
def test_sin_squared_is_accurate(limit: float, tolerance: float) -> None:
    x = np.linspace(-limit, limit, 1_000_001).astype(np.float32)
    assert np.abs(jax.jit(sin_squared)(x) - np.sin(x.astype(np.float64)) ** 2).max() < tolerance


def test_sin_squared_stays_a_square_of_a_sine() -> None:
    y = np.asarray(jax.jit(sin_squared)(np.asarray([0.0, -0.0, 1e5, -1e8, 1e20, 3e38], np.float32)))
    assert (y[:2] == 0).all() and (y >= 0).all() and (y <= 1).all()


@pytest.mark.parametrize("conv", [causal_conv, depthwise_conv, conv_to_mono, conv_transpose])
def test_half_precision_is_summed_in_single(conv) -> None:
    """512 products of about 1: their sum in bfloat16 would stop at 256, where 1 is less than a rounding step."""
    channels = 1 if conv is depthwise_conv else 512
    x = jnp.ones((1, 700, channels), jnp.bfloat16)
    if conv is conv_transpose:
        y = conv(x, jnp.ones((channels, 2, 3), jnp.bfloat16), 3)
    else:
        y = conv(x, jnp.ones((1, channels, 512 // channels), jnp.bfloat16))
    assert (np.asarray(y, np.float32) == 512).all()
