"""The vocoder: frames of codes to sound, 12.5 frames and 24,000 samples per second in the public model.

    codes [Q, F] -> mean of embeddings -> sliding-window transformer -> upsampling stages (ConvNeXt)
                 -> decoder blocks (Snake, transposed convolution, residual units) -> samples

Everything is causal, so there is one way to run it: a chunk of frames after a `VocoderState`, which holds what later
frames can see of earlier ones. A whole code sequence is a chunk too, and any cut into chunks gives the same samples.

A decoder block's transposed convolution completes a block of samples only with the next input, so the sound is late: of
the samples that the first chunks give, the first `Code2WavConfig.lost_samples` come before the sound's beginning, and
the caller drops them. Inside, what comes before the beginning is set to zero at every stage, which is what a
convolution that starts there sees as padding.

Source: transformers `Qwen3OmniMoeCode2Wav`. Deliberate difference: the state, hence no seams (the reference starts
afresh every 300 frames and loses `lost_samples` there; `decode.vocode` has that as a mode).
"""

from dataclasses import dataclass, replace
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from omni_jax.config import Code2WavConfig
from omni_jax.errors import InputError
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.param import LayerNorm, Linear, Module, RMSNorm, param, project
from omni_jax.ops.cache import CACHE_AXES, KVCache
from omni_jax.ops.conv import causal_conv, conv_to_mono, conv_transpose, depthwise_conv, snake
from omni_jax.ops.gelu import gelu_exact
from omni_jax.ops.rope import rope
from omni_jax.sharding import Array, constrain, constrain_rows

# Constants of the architecture: no config.json states them.
SAMPLES_PER_SECOND = 24_000
KERNEL = 7
DILATIONS = (1, 3, 9)
NEXT_EXPANSION = 4
NEXT_NORM_EPS = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocoderState:
    """What later frames need of the frames so far; all rows have the same number of frames.

    frames: int32 [], their number. k and v: [L, B, K, W - 1, H], the keys and values of the last W - 1 (W the sliding
    window), newest last. tails: for each convolution, in the order in which they run, its last P inputs [B, P, C].
    """

    frames: jax.Array
    k: jax.Array
    v: jax.Array
    tails: tuple[jax.Array, ...]

    def laid_over(self, mesh: Mesh | None) -> "VocoderState":
        """The same state, inside `jit`, with its rows and heads on the devices of `mesh` that compute them."""
        tails = tuple(constrain_rows(tail, mesh) for tail in self.tails)
        return replace(self, k=constrain(self.k, CACHE_AXES, mesh), v=constrain(self.v, CACHE_AXES, mesh), tails=tails)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocodedChunk:
    """wave: float32 [B, samples]. state: what these frames and those before leave for later ones."""

    wave: jax.Array
    state: VocoderState


@dataclass(frozen=True)
class Stage:
    """A chunk at one sample rate: it follows `frames` int32 [] frames, and its first `count` frames are real.

    Every convolution takes a stage and gives the one after it, so the order in which they find their tails is that in
    which the stage goes through them.

    before: the tails [B, P, C] that the chunk before left, for all convolutions; None at the beginning, which means
    zeros. after: those that this one leaves, for the convolutions so far. rate: samples per frame here. lost: samples
    here before the sound's beginning.
    """

    frames: jax.Array
    count: jax.Array | int
    before: tuple[jax.Array, ...] | None
    after: tuple[jax.Array, ...] = ()
    rate: int = 1
    lost: int = 0

    def look_back(self, x: jax.Array, size: int) -> tuple[jax.Array, "Stage"]:
        """x [B, T, C] after the `size` samples before it: [B, size + T, C]; the stage keeps the last ones."""
        if not size:
            return x, self
        B, _, C = x.shape
        tail = jnp.zeros((B, size, C), x.dtype) if self.before is None else self.before[len(self.after)]
        seen = jnp.concatenate([tail, x], axis=1)
        last = jax.lax.dynamic_slice_in_dim(seen, self.count * self.rate, size, axis=1)
        return seen, replace(self, after=(*self.after, last))

    def upsampled(self, stride: int, look_back: int) -> "Stage":
        """The stage after a transposed convolution that sees `look_back` earlier samples."""
        return replace(self, rate=self.rate * stride, lost=(self.lost + look_back) * stride)

    def silence(self, x: jax.Array) -> jax.Array:
        """x [B, T, C] with zeros for what comes before the sound's beginning."""
        if not self.lost:
            return x
        # A frame gives at least one sample, so nothing is left after `lost` frames; the bound prevents an overflow.
        left = self.lost - self.rate * jnp.minimum(self.frames, self.lost)
        # Written once: otherwise each of its readers computes x again, and with it the sums that x is the last of.
        return jax.lax.optimization_barrier(jnp.where(jnp.arange(x.shape[1])[:, None] < left, 0, x))


class CausalConv(Module):
    """A causal convolution: weight [out, in, k], bias [out]."""

    def __init__(self, rngs: nnx.Rngs, channels_in: int, channels_out: int, dilation: int = 1):
        scale = (channels_in * KERNEL) ** -0.5
        self.weight = param(rngs, (channels_out, channels_in, KERNEL), (None,) * 3, scale=scale)
        self.bias = param(rngs, (channels_out,), (None,))
        self.dilation = dilation

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, in] -> [B, T, out], and the stage after it."""
        seen, stage = stage.look_back(x, (KERNEL - 1) * self.dilation)
        return causal_conv(seen, self.weight[...], self.dilation) + self.bias[...], stage


class DepthwiseConv(Module):
    """A causal convolution of each channel by itself: weight [C, 1, k], bias [C]."""

    def __init__(self, rngs: nnx.Rngs, channels: int):
        self.weight = param(rngs, (channels, 1, KERNEL), (None,) * 3, scale=KERNEL**-0.5)
        self.bias = param(rngs, (channels,), (None,))

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, C] -> [B, T, C], and the stage after it."""
        seen, stage = stage.look_back(x, KERNEL - 1)
        return (depthwise_conv(seen, self.weight[...]) + self.bias[...]).astype(x.dtype), stage


class MonoConv(Module):
    """The causal convolution to one channel: weight [1, in, k], bias [1]."""

    def __init__(self, rngs: nnx.Rngs, channels: int):
        self.weight = param(rngs, (1, channels, KERNEL), (None,) * 3, scale=(channels * KERNEL) ** -0.5)
        self.bias = param(rngs, (1,), (None,))

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, in] -> float32 [B, T], and the stage after it."""
        seen, stage = stage.look_back(x, KERNEL - 1)
        return conv_to_mono(seen, self.weight[...]) + self.bias[...], stage


class Pointwise(Module):
    """A convolution of kernel 1: weight [C, C, 1], bias [C]."""

    def __init__(self, rngs: nnx.Rngs, channels: int):
        self.weight = param(rngs, (channels, channels, 1), (None,) * 3, scale=channels**-0.5)
        self.bias = param(rngs, (channels,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, T, C]."""
        return (project(x, self.weight[...][..., 0]) + self.bias[...]).astype(x.dtype)


class TransposedConv(Module):
    """`stride` samples for each one, from it and the `look_back` before it: weight [in, out, k], bias [out]."""

    def __init__(self, rngs: nnx.Rngs, channels_in: int, channels_out: int, stride: int, look_back: int):
        kernel, scale = stride * (look_back + 1), (channels_in * (look_back + 1)) ** -0.5
        self.weight = param(rngs, (channels_in, channels_out, kernel), (None,) * 3, scale=scale)
        self.bias = param(rngs, (channels_out,), (None,))
        self.stride, self.look_back = stride, look_back

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, in] -> [B, T * stride, out], and the stage after it."""
        seen, stage = stage.look_back(x, self.look_back)
        y = (conv_transpose(seen, self.weight[...], self.stride) + self.bias[...]).astype(x.dtype)
        stage = stage.upsampled(self.stride, self.look_back)
        return stage.silence(y), stage


class Snake(Module):
    """The Snake activation: alpha and beta [C], the logarithms of frequency and of inverse magnitude."""

    def __init__(self, rngs: nnx.Rngs, channels: int):
        self.alpha = param(rngs, (channels,), (None,))
        self.beta = param(rngs, (channels,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, C] -> [B, T, C]."""
        return snake(x, self.alpha[...], self.beta[...])


class UpsampleStage(Module):
    """A transposed convolution without overlap, then a ConvNeXt block."""

    def __init__(self, rngs: nnx.Rngs, channels: int, factor: int):
        D, inner = channels, NEXT_EXPANSION * channels
        self.conv = TransposedConv(rngs, D, D, factor, look_back=0)
        self.dwconv = DepthwiseConv(rngs, D)
        self.norm = LayerNorm(rngs, D, NEXT_NORM_EPS)
        self.fc1 = Linear(rngs, (inner, D), ("mlp", "embed"))
        self.fc2 = Linear(rngs, (D, inner), ("embed", "mlp"))
        self.gamma = param(rngs, (D,), ("embed",), fill=1.0)

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, D] -> [B, T * factor, D], and the stage after it."""
        x, stage = self.conv(x, stage)
        y, stage = self.dwconv(x, stage)
        return x + self.gamma[...] * self.fc2(gelu_exact(self.fc1(self.norm(y)))), stage


class Upsample(Module):
    """stage_0, stage_1, ...: one for each of the upsampling ratios."""

    def __init__(self, rngs: nnx.Rngs, config: Code2WavConfig):
        self.stages = len(config.upsampling_ratios)
        for i, factor in enumerate(config.upsampling_ratios):
            setattr(self, f"stage_{i}", UpsampleStage(rngs, config.transformer.hidden_size, factor))

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, F, D] -> [B, F * product of ratios, D], and the stage after it."""
        for i in range(self.stages):
            with jax.named_scope(f"upsample_{i}"):
                x, stage = getattr(self, f"stage_{i}")(x, stage)
        return x, stage


class ResidualUnit(Module):
    """x + conv2(snake(conv1(snake(x)))), conv1 dilated."""

    def __init__(self, rngs: nnx.Rngs, channels: int, dilation: int):
        self.act1 = Snake(rngs, channels)
        self.conv1 = CausalConv(rngs, channels, channels, dilation)
        self.act2 = Snake(rngs, channels)
        self.conv2 = Pointwise(rngs, channels)

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, C] -> [B, T, C], and the stage after it."""
        y, stage = self.conv1(self.act1(x), stage)
        return stage.silence(x + self.conv2(self.act2(y))), stage


class DecoderBlock(Module):
    """Snake (alpha, beta), a transposed convolution that halves the channels, then residual units."""

    def __init__(self, rngs: nnx.Rngs, channels: int, stride: int):
        self.alpha = param(rngs, (channels,), (None,))
        self.beta = param(rngs, (channels,), (None,))
        self.conv = TransposedConv(rngs, channels, channels // 2, stride, look_back=1)
        for j, dilation in enumerate(DILATIONS):
            setattr(self, f"unit_{j}", ResidualUnit(rngs, channels // 2, dilation))

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, C] -> [B, T * stride, C / 2], and the stage after it."""
        x, stage = self.conv(snake(x, self.alpha[...], self.beta[...]), stage)
        for j in range(len(DILATIONS)):
            x, stage = getattr(self, f"unit_{j}")(x, stage)
        return x, stage


class WaveDecoder(Module):
    """The first convolution, block_0, block_1, ... for the upsampling rates, Snake (alpha, beta), the last one."""

    def __init__(self, rngs: nnx.Rngs, config: Code2WavConfig):
        self.blocks, channels = len(config.upsample_rates), config.decoder_dim
        self.conv_in = CausalConv(rngs, config.transformer.hidden_size, channels)
        for i, rate in enumerate(config.upsample_rates):
            setattr(self, f"block_{i}", DecoderBlock(rngs, channels // 2**i, rate))
        channels //= 2**self.blocks
        self.alpha = param(rngs, (channels,), (None,))
        self.beta = param(rngs, (channels,), (None,))
        self.conv_out = MonoConv(rngs, channels)

    def __call__(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """[B, T, D] -> float32 [B, T * product of rates], and the stage after it."""
        with jax.named_scope("conv_in"):
            x, stage = self.conv_in(x, stage)
        for i in range(self.blocks):
            with jax.named_scope(f"block_{i}"):
                x, stage = getattr(self, f"block_{i}")(x, stage)
        with jax.named_scope("conv_out"):
            return self.conv_out(snake(x, self.alpha[...], self.beta[...]), stage)


class Code2Wav(Module):
    """embed [Q, C, D] (Q quantizers of C codes), decoder layers and norm, upsampling stages, waveform decoder."""

    def __init__(self, rngs: nnx.Rngs, config: Code2WavConfig):
        Q, C, D = config.num_quantizers, config.codebook_size, config.transformer.hidden_size
        self.config = config
        self.embed = param(rngs, (Q, C, D), (None, "vocab", "embed"), scale=1.0)
        self.layers = DecoderLayers(rngs, config.transformer)
        self.norm = RMSNorm(rngs, D, config.transformer.rms_norm_eps)
        self.upsample = Upsample(rngs, config)
        self.decoder = WaveDecoder(rngs, config)

    def start(self, rows: int) -> VocoderState:
        """The state of `rows` rows before their first frame."""
        c, dtype = self.config.transformer, self.embed[...].dtype

        def tails() -> tuple[jax.Array, ...]:
            x = jnp.zeros((rows, 1, c.hidden_size), dtype)
            return self.sound(x, Stage(jnp.int32(0), jnp.int32(0), None))[1].after

        cache = KVCache.empty(c.num_layers, rows, c.num_kv_heads, self.past, c.head_dim, dtype)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tails))
        return VocoderState(jnp.int32(0), cache.k, cache.v, zeros)

    @property
    def past(self) -> int:
        """Frames before its own that a frame attends to."""
        return self.config.sliding_window - 1

    @overload
    def __call__(self, codes: Array, state: None = None, count: Array | int | None = None) -> jax.Array: ...

    @overload
    def __call__(self, codes: Array, state: VocoderState, count: Array | int | None = None) -> VocodedChunk: ...

    def __call__(
        self, codes: Array, state: VocoderState | None = None, count: Array | int | None = None
    ) -> jax.Array | VocodedChunk:
        """The whole sound of codes int [B, Q, F]: float32 [B, samples] in [-1, 1]; with a state, `VocodedChunk`.

        state: what earlier frames leave for these; the sound is then [B, F * total_upsample], and the first
            `lost_samples` of a row's first frames are the caller's to drop.
        count: how many of the frames are real, all by default; what follows them is padding, which gives meaningless
            samples and leaves nothing in the state.

        Raises InputError for an array of another shape.
        """
        codes, Q = jnp.asarray(codes), self.config.num_quantizers
        if codes.ndim != 3 or codes.shape[1] != Q:
            raise InputError(f"codes have shape {list(codes.shape)}; give int [B, Q, F] with Q = {Q}")
        if state is None:
            return self(codes, self.start(codes.shape[0]), count).wave[:, self.config.lost_samples :]
        real = jnp.int32(codes.shape[2] if count is None else count)
        x, k, v = self.attend(self.embed_codes(codes), state, real)
        wave, stage = self.sound(x, Stage(state.frames, real, state.tails))
        return VocodedChunk(jnp.clip(wave, -1.0, 1.0), VocoderState(state.frames + real, k, v, stage.after))

    @jax.named_scope("embed")
    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [B, Q, F] -> [B, F, D]: the mean over codebooks."""
        embed = self.embed[...]
        x = embed[jnp.arange(codes.shape[1])[:, None], codes]
        return jnp.mean(x.astype(jnp.float32), axis=1).astype(embed.dtype)

    @jax.named_scope("transformer")
    def attend(
        self, x: jax.Array, state: VocoderState, count: jax.Array | int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The transformer: x [B, F, D] -> normed [B, F, D], and the keys and values of the last frames for the state.

        Positions count from the row's beginning, in float32.
        """
        (B, F, _), past, c = x.shape, self.past, self.config.transformer
        more = [(0, 0)] * 3 + [(0, F), (0, 0)]
        cache = KVCache(jnp.pad(state.k, more), jnp.pad(state.v, more), jnp.full((B,), past, jnp.int32))
        positions = (state.frames + jnp.arange(F))[None]
        first_valid = jnp.full((B,), jnp.maximum(past - state.frames, 0))
        out = self.layers.extend(x, rope(positions, c.head_dim, c.rope, x.dtype), cache, first_valid)
        k, v = (jax.lax.dynamic_slice_in_dim(a, count, past, axis=3) for a in (out.cache.k, out.cache.v))
        return self.norm(out.hidden), k, v

    def sound(self, x: jax.Array, stage: Stage) -> tuple[jax.Array, Stage]:
        """The convolutions: x [B, F, D] -> float32 [B, F * total_upsample], and the stage after them."""
        return self.decoder(*self.upsample(x, stage))
