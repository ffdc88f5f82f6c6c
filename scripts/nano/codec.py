"""The codec: an encoder that only training needs, residual quantisation, and the project's own Code2Wav.

    wave -> log-mel -> encoder -> latent [F, D] -> 16 codebooks in turn -> codes [16, F]
                                                        `-> sum of their entries -> Code2Wav -> wave

Code2Wav reads the mean of its embeddings, so entry c of codebook q is embedding [q, c] divided by the number of
codebooks. Of some samples only the first codebooks are used (quantiser dropout), so that the first ones carry most.
Codebooks are means of what they stand for, as in van den Oord et al., "Neural Discrete Representation Learning",
appendix A.1; an entry that nothing uses becomes a latent of the batch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omni_jax.config import Code2WavConfig
from omni_jax.models.code2wav import SAMPLES_PER_SECOND, Code2Wav, Stage
from omni_jax.models.param import Declaration, LayerNorm, Linear, Module, bind, param

# Mel bins and hop of what the encoder reads: eight hops are a frame of codes.
MEL_BINS, WINDOW, HOP = 80, 1024, 240
STRIDES = (2, 2, 2)
WIDTH = 160
# Windows of the spectral loss, in samples.
WINDOWS = (128, 256, 512, 1024, 2048)
COMMITMENT, DECAY = 0.25, 0.98
# The smallest usage of an entry, in latents per batch, before it becomes another.
LEAST_USAGE = 0.05
FLOOR = 1e-5


class Encoder(Module):
    """A convolution over mel frames, a block and a strided convolution for each of STRIDES, a projection."""

    def __init__(self, rngs: nnx.Rngs, dim: int):
        self.first = param(rngs, (3 * MEL_BINS, WIDTH), (None, None), scale=(3 * MEL_BINS) ** -0.5)
        for i, stride in enumerate(STRIDES):
            setattr(self, f"norm_{i}", LayerNorm(rngs, WIDTH, 1e-6))
            setattr(self, f"up_{i}", Linear(rngs, (2 * WIDTH, 5 * WIDTH), (None, None)))
            setattr(self, f"down_{i}", Linear(rngs, (WIDTH, 2 * WIDTH), (None, None)))
            setattr(self, f"stride_{i}", Linear(rngs, (WIDTH, stride * WIDTH), (None, None)))
        self.norm = LayerNorm(rngs, WIDTH, 1e-6)
        self.out = Linear(rngs, (dim, WIDTH), (None, None))

    def __call__(self, mel: jax.Array) -> jax.Array:
        """Log-mel float32 [B, 8 F, MEL_BINS] -> latents [B, F, D]."""
        x = _neighbours(mel, 1) @ self.first[...]
        for i, stride in enumerate(STRIDES):
            y = getattr(self, f"norm_{i}")(x)
            x = x + getattr(self, f"down_{i}")(jax.nn.gelu(getattr(self, f"up_{i}")(_neighbours(y, 2))))
            x = getattr(self, f"stride_{i}")(x.reshape(x.shape[0], -1, stride * WIDTH))
        return self.out(self.norm(x))


def _neighbours(x: jax.Array, each: int) -> jax.Array:
    """x [B, T, C] with the `each` frames on either side: [B, T, (2 each + 1) C]."""
    T = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (each, each), (0, 0)))
    return jnp.concatenate([padded[:, i : i + T] for i in range(2 * each + 1)], axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codebooks:
    """entries float32 [Q, C, D]; how often each was used lately, counts [Q, C], and sums of what it stood for."""

    entries: jax.Array
    counts: jax.Array
    sums: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """codes int32 [Q, N]; value [N, D], the sum of entries; residuals [Q, N, D] that the codebooks were given."""

    codes: jax.Array
    value: jax.Array
    residuals: jax.Array


def quantise(latents: jax.Array, entries: jax.Array, quantisers: jax.Array) -> Quantised:
    """Residual quantisation of latents [N, D] by codebooks entries [Q, C, D]; row n uses the first quantisers[n]."""

    def one(carry: tuple, at: tuple) -> tuple[tuple, tuple]:
        residual, value = carry
        q, codebook = at
        distance = jnp.sum(codebook**2, axis=1) - 2 * residual @ codebook.T
        code = jnp.argmin(distance, axis=1)
        taken = jnp.where((q < quantisers)[:, None], codebook[code], 0)
        return (residual - taken, value + taken), (code.astype(jnp.int32), residual)

    start = (latents, jnp.zeros_like(latents))
    (_, value), (codes, residuals) = jax.lax.scan(one, start, (jnp.arange(len(entries)), entries))
    return Quantised(codes, value, residuals)


def updated(codebooks: Codebooks, found: Quantised, quantisers: jax.Array, key: jax.Array) -> Codebooks:
    """The codebooks after a batch: moving means of what entries stood for; quantisers int32 [N] as in `quantise`."""
    Q, C, _ = codebooks.entries.shape
    counted = (jnp.arange(Q)[:, None] < quantisers).astype(jnp.float32)
    chosen = jax.nn.one_hot(found.codes, C) * counted[..., None]
    counts = DECAY * codebooks.counts + (1 - DECAY) * jnp.sum(chosen, axis=1)
    sums = DECAY * codebooks.sums + (1 - DECAY) * jnp.einsum("QNC,QND->QCD", chosen, found.residuals)
    entries = sums / jnp.maximum(counts, 1e-6)[..., None]
    # What nothing uses becomes the residual of one of the latents.
    other = jax.random.randint(key, (Q, C), 0, found.codes.shape[1])
    fresh = jnp.take_along_axis(found.residuals, other[..., None], axis=1)
    unused = (counts < LEAST_USAGE)[..., None]
    entries = jnp.where(unused, fresh, entries)
    return Codebooks(
        entries,
        jnp.where(unused[..., 0], 1.0, counts),
        jnp.where(unused, fresh, sums),
    )


def decode(params: dict, value: jax.Array, declaration: Declaration) -> jax.Array:
    """The wave float32 [B, F * 1920 - lost] of sums of entries [B, F, D], by Code2Wav's parameters."""
    vocoder: Code2Wav = bind(declaration, params)
    B, F, _ = value.shape
    state = vocoder.start(B)
    x, _, _ = vocoder.attend(value, state, F)
    wave, _ = vocoder.sound(x, Stage(state.frames, jnp.int32(F), state.tails))
    return wave[:, vocoder.config.lost_samples :]


def log_mel(wave: jax.Array) -> jax.Array:
    """Log-mel float32 [B, n / HOP, MEL_BINS] of waves [B, n]; frame t is centred in its hop."""
    side = (WINDOW - HOP) // 2
    frames = _frames(jnp.pad(wave, ((0, 0), (side, side))), WINDOW, HOP)
    magnitude = jnp.abs(jnp.fft.rfft(frames * jnp.asarray(np.hanning(WINDOW), jnp.float32)))
    return jnp.log(magnitude @ jnp.asarray(mel_filters(WINDOW, MEL_BINS).T) + FLOOR)


def spectral_loss(made: jax.Array, wanted: jax.Array) -> jax.Array:
    """float32 []: how far spectra of waves [B, n] are apart, in magnitude and in its logarithm, over WINDOWS."""
    total = jnp.float32(0)
    for window in WINDOWS:
        a, b = (_magnitudes(wave, window) for wave in (made, wanted))
        log = jnp.mean(jnp.abs(jnp.log(a + FLOOR * window) - jnp.log(b + FLOOR * window)))
        total += log + jnp.sqrt(jnp.sum((a - b) ** 2) / (jnp.sum(b**2) + FLOOR))
    return total / len(WINDOWS)


def _magnitudes(wave: jax.Array, window: int) -> jax.Array:
    frames = _frames(wave, window, window // 4) * jnp.asarray(np.hanning(window), jnp.float32)
    spectrum = jnp.fft.rfft(frames)
    return jnp.sqrt(jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2 + 1e-9)


def _frames(wave: jax.Array, size: int, hop: int) -> jax.Array:
    """Overlapping pieces [B, T, size] of waves [B, n]."""
    parts = size // hop if size % hop == 0 else 0
    T = (wave.shape[1] - size) // hop + 1
    if parts:
        blocks = wave[:, : (T + parts - 1) * hop].reshape(wave.shape[0], -1, hop)
        return jnp.concatenate([blocks[:, i : i + T] for i in range(parts)], axis=-1)
    return wave[:, np.arange(T)[:, None] * hop + np.arange(size)]


def mel_filters(window: int, bins: int) -> np.ndarray:
    """Triangles float32 [bins, window / 2 + 1] at equal steps of mel, up to half the sampling rate."""
    hertz = np.fft.rfftfreq(window, 1 / SAMPLES_PER_SECOND)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + hertz[-1] / 700), bins + 2) / 2595) - 1)
    low, centre, high = (edges[i : i + bins, None] for i in range(3))
    rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def embeddings(entries: Any) -> Any:
    """Code2Wav's embeddings [Q, C, D] of codebooks entries [Q, C, D]."""
    return entries * len(entries)


def first_codebooks(latents: jax.Array, config: Code2WavConfig, key: jax.Array) -> Codebooks:
    """Codebooks for latents [N, D]: each holds some of what those before it leave of the latents."""

    def one(residual: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        codebook = residual[jax.random.randint(key, (config.codebook_size,), 0, len(residual))]
        found = quantise(residual, codebook[None], jnp.ones(len(residual), jnp.int32))
        return residual - found.value, codebook

    entries = jax.lax.scan(one, latents, jax.random.split(key, config.num_quantizers))[1]
    return Codebooks(entries, jnp.ones(entries.shape[:2]), entries)


@partial(jax.jit, static_argnames="declaration")
def encode(params: dict, entries: jax.Array, wave: jax.Array, *, declaration: Declaration) -> jax.Array:
    """The codes int32 [B, Q, F] of waves float32 [B, F * 1920]; params, declaration: of the encoder."""
    encoder: Encoder = bind(declaration, params)
    latents = encoder(log_mel(wave))
    B, F, D = latents.shape
    found = quantise(latents.reshape(-1, D), entries, jnp.full((B * F,), len(entries)))
    return found.codes.reshape(-1, B, F).transpose(1, 0, 2)
