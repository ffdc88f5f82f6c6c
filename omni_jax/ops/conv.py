"""Causal convolutions over time and the Snake activation: what the vocoder turns codes into sound with.

Activations are [B, T, C], weights stay as they are on disk. Nothing here pads: a convolution is given P earlier samples
and then the T that it is called for, so that a chunk of a signal and a whole one (with zeros in front) are the same
call. Products accumulate in float32. Weights are not in the order that products want: of a weight and what it is
multiplied with, the smaller one is put in order, because to turn a large weight is to read and write it once more.

Source: transformers `Qwen3OmniMoeCausalConvNet`, `Qwen3OmniMoeCausalTransConvNet` and `Qwen3OmniMoeSnakeBeta`.
Deliberate differences: a transposed convolution is one matrix product, and keeps the samples that the reference trims
on the left (those trimmed on the right come with the next chunk); the sine is a polynomial.
"""

import jax
import jax.numpy as jnp

from omni_jax.sharding import platform

# Pi in three parts, of which multiples up to 2^13 times the first two are exact in float32.
PI_PARTS = (3.140625, 9.67502593994140625e-4, 1.509957990978376432e-7)
# sin(r) / r - 1 in powers of r^2 from the first on: within 5e-9 on [-pi/2, pi/2].
SINE = (-1.66666571e-01, 8.33301710e-03, -1.98066015e-04, 2.60002433e-06)


def causal_conv(x: jax.Array, weight: jax.Array, dilation: int = 1) -> jax.Array:
    """x [B, P + T, C] with weight [O, C, k] -> [B, T, O] in x's dtype, where P = (k - 1) * dilation."""
    O, C, k = weight.shape
    B, T = x.shape[0], x.shape[1] - (k - 1) * dilation
    # On CPU the library does not turn the weight.
    if B * T < O and platform() != "cpu":
        taps = jnp.stack([x[:, i * dilation : i * dilation + T] for i in range(k)], axis=-1).reshape(B, T, C * k)
        rows = weight.reshape(O, C * k).astype(x.dtype)
        return jnp.einsum("BTR,OR->BTO", taps, rows, preferred_element_type=jnp.float32).astype(x.dtype)
    # XLA on CPU and cuDNN on GPU both sum half-precision products in float32.
    return jax.lax.conv_general_dilated(
        x,
        weight.astype(x.dtype),
        window_strides=(1,),
        padding="VALID",
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "OIW", "NWC"),
    )


def depthwise_conv(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [B, P + T, C] with weight [C, 1, k], each channel by itself -> float32 [B, T, C], where P = k - 1."""
    k = weight.shape[2]
    T = x.shape[1] - k + 1
    # One fused pass over x: libraries are slow at groups of one channel.
    return jnp.sum(jnp.stack([x[:, i : i + T].astype(jnp.float32) * weight[:, 0, i] for i in range(k)]), axis=0)


def conv_to_mono(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [B, P + T, C] with weight [1, C, k] -> float32 [B, T], where P = k - 1."""
    k = weight.shape[2]
    T = x.shape[1] - k + 1
    # All taps of all samples in one product, then a sum along diagonals: libraries want more than one output channel.
    taps = jnp.einsum("BTC,CK->BTK", x, weight[0], preferred_element_type=jnp.float32)
    return jnp.sum(jnp.stack([taps[:, i : i + T, i] for i in range(k)]), axis=0)


def conv_transpose(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """x [B, P + T, C] with weight [C, O, k] -> float32 [B, T * stride, O], where k = (P + 1) * stride.

    Block t of `stride` samples is the sum over p of x[t - p] with taps p * stride and on.
    """
    B, S, C = x.shape
    O, parts = weight.shape[1], weight.shape[2] // stride
    T = S - parts + 1
    if B * S < C:
        columns = weight.reshape(C, -1).astype(x.dtype)
        blocks = jnp.einsum("BSC,CR->BSR", x, columns, preferred_element_type=jnp.float32)
        blocks = blocks.reshape(B, S, O, parts, stride).transpose(0, 1, 3, 4, 2)
    else:
        rows = weight.reshape(C, O, parts, stride).transpose(2, 3, 1, 0).reshape(-1, C)
        blocks = jnp.einsum("BSC,RC->BSR", x, rows, preferred_element_type=jnp.float32)
    blocks = blocks.reshape(B, S, parts, stride * O)
    y = blocks[:, parts - 1 :, 0]
    for p in range(1, parts):
        y = y + blocks[:, parts - 1 - p : S - p, p]
    return y.reshape(B, T * stride, O)


def snake(x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """x + sin^2(x e^alpha) / e^beta per channel, in x's dtype: x [B, T, C], alpha and beta [C]."""
    x32, alpha, beta = x.astype(jnp.float32), alpha.astype(jnp.float32), beta.astype(jnp.float32)
    return (x32 + sin_squared(x32 * jnp.exp(alpha)) * (1.0 / (jnp.exp(beta) + 1e-9))).astype(x.dtype)


def sin_squared(x: jax.Array) -> jax.Array:
    """sin(x)^2 of float32 x [...], elementwise, within 3e-7 for |x| up to a thousand, between 0 and 1 for any finite x.

    XLA on CPU calls a scalar sine for each number, which takes ten times as long.
    """
    turns = jnp.round(x * (1 / jnp.pi))
    r = x
    for part in PI_PARTS:
        r = r - turns * part
    r = jnp.clip(r, -jnp.pi / 2, jnp.pi / 2)
    square, series = r * r, SINE[-1]
    for coefficient in SINE[-2::-1]:
        series = series * square + coefficient
    sine = r + r * (square * series)
    return jnp.minimum(sine * sine, 1.0)
