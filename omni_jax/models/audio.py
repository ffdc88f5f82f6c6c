"""The audio encoder: log-mel frames to tokens of the text model, 13 tokens per second.

Data flow: `inputs` cuts each clip into chunks of about one second and packs them by attention window (eight chunks in
the public model) -> three strided convolutions per chunk, 8 mel frames per token -> sinusoidal positions that restart
in each chunk -> blocks in which a window's tokens see each other -> two projections to the text model's width.

Source: transformers `Qwen3OmniMoeAudioEncoder`. Deliberate difference, batch-independent short clips: the reference
pads every chunk to the longest one in the call, and the convolutions' biases turn that padding into signal, so a clip
shorter than one chunk changes with its batch mates (by up to 14 % on the tests' random checkpoints). Here each chunk
carries the `width` that the convolutions must see: a short clip always equals the reference's result for that clip
alone, and clips of at least one chunk equal it in any batch. With `width` = chunk_frames everywhere the result is the
reference's in a batch with a longer clip.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.config import AudioConfig
from omni_jax.models.encoder import EncoderBlocks
from omni_jax.models.param import LayerNorm, Linear, Module, param
from omni_jax.ops.gelu import gelu_exact

# Constants of the architecture: no config.json states them.
NORM_EPS = 1e-5
MAX_TIMESCALE = 10_000.0
NUM_CONVS = 3

# Numbers of the first convolution's output that are held at once: those of 64 chunks of the public model. A model with
# fewer channels takes more chunks at once: inside a loop, even one of a single turn, XLA on CPU is four times slower.
CONV_NUMBERS = 100_000_000


Count = TypeVar("Count", int, jax.Array)


def halve(frames: Count) -> Count:
    """Length after one convolution of stride 2, for an integer or an integer array [...]; 0 stays 0."""
    return (frames - 1) // 2 + 1


def steps(frames: Count) -> Count:
    """Length after all convolutions, for an integer or an integer array [...]: of mel frames or of mel bins."""
    for _ in range(NUM_CONVS):
        frames = halve(frames)
    return frames


def sinusoids(length: int, width: int) -> np.ndarray:
    """Positions 0..length-1 as float32 [length, width]: the sines of geometric rates, then their cosines."""
    rates = np.exp(-np.log(MAX_TIMESCALE) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class StridedConv(Module):
    """3 x 3 convolution of stride 2 over (mel, time), padded by one, with the exact GELU; weight as on disk, OIHW."""

    def __init__(self, rngs: nnx.Rngs, channels_in: int, channels_out: int):
        scale = (9 * channels_in) ** -0.5
        self.weight = param(rngs, (channels_out, channels_in, 3, 3), (None,) * 4, scale=scale)
        self.bias = param(rngs, (channels_out,), (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[in, M, F] -> [out, ceil(M / 2), ceil(F / 2)]."""
        y = jax.lax.conv_general_dilated(x[None], self.weight[...], (2, 2), ((1, 1), (1, 1)))[0]
        return gelu_exact(y + self.bias[...][:, None, None])


class AudioEncoder(Module):
    """Windows of mel chunks to text-model tokens."""

    def __init__(self, rngs: nnx.Rngs, config: AudioConfig):
        D, channels = config.hidden_size, config.conv_channels
        self.config = config
        self.conv1 = StridedConv(rngs, 1, channels)
        self.conv2 = StridedConv(rngs, channels, channels)
        self.conv3 = StridedConv(rngs, channels, channels)
        self.conv_out = Linear(rngs, (D, channels * steps(config.mel_bins)), ("embed", None), bias=False)
        self.blocks = EncoderBlocks(
            rngs,
            layers=config.num_layers,
            width=D,
            heads=config.num_heads,
            mlp=config.intermediate_size,
            eps=NORM_EPS,
            activation=gelu_exact,
        )
        self.post_norm = LayerNorm(rngs, D, NORM_EPS)
        self.proj1 = Linear(rngs, (D, D), ("mlp", "embed"))
        self.proj2 = Linear(rngs, (config.out_hidden_size, D), ("embed", "mlp"))

    @jax.named_scope("audio")
    def __call__(self, mel: jax.Array, frames: jax.Array, width: jax.Array, remat: bool = False) -> jax.Array:
        """Encode windows: mel [W, C, M, F], frames and width int32 [W, C] -> tokens [W, C * 13, out].

        mel: one attention window of one clip per row, in chunks of F = chunk_frames mel frames, zero beyond `frames`;
        any float dtype, cast to that of the parameters. frames: valid frames of each chunk, 0 for padding; only the
        last chunk of a clip may be shorter than F. width: the frames that the convolutions see: F for a clip of at
        least one chunk, else the clip's own length, so that a short clip does not depend on its batch mates.
        A window's valid tokens are a prefix of its row, `steps(frames).sum()` long; the rest is meaningless but finite.
        remat: as in `EncoderBlocks`; the convolutions are computed anew too.
        """
        W, C, M, F = mel.shape
        chunks = mel.astype(self.conv1.weight[...].dtype).reshape(W * C, M, F)
        embed = jax.checkpoint(self._embed_chunk) if remat else self._embed_chunk
        at_once = max(1, CONV_NUMBERS // (self.conv1.weight.shape[0] * halve(M) * halve(F)))
        inputs = chunks, width.reshape(W * C)
        x = jax.vmap(embed)(inputs) if W * C <= at_once else jax.lax.map(embed, inputs, batch_size=at_once)
        x = x + jnp.asarray(sinusoids(x.shape[1], x.shape[2]), x.dtype)
        x, _ = self.blocks(x.reshape(W, -1, x.shape[2]), steps(frames).sum(axis=1), remat=remat)
        return self.proj2(gelu_exact(self.proj1(self.post_norm(x))))

    @jax.named_scope("convolutions")
    def _embed_chunk(self, chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        """One chunk's mel [M, F] and its width int32 [] -> [steps, D], as if nothing existed at or beyond the width."""
        mel, width = chunk
        x = mel[None]
        for conv in (self.conv1, self.conv2, self.conv3):
            x, width = conv(x), halve(width)
            x = jnp.where(jnp.arange(x.shape[2]) < width, x, 0)
        channels, bands, time = x.shape
        return self.conv_out(x.transpose(2, 0, 1).reshape(time, channels * bands))
