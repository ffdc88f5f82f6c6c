"""The stage codec: train encoder, codebooks and Code2Wav on what the speakers say, and write the codes of all of it.

speech/*.wav -> pieces of FRAMES frames -> step -> codec.npz, loss.csv
codec.npz -> codes/<speaker>/<number>.npy, code2wav parameters for the model
"""

import csv
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import Code2WavConfig
from omni_jax.errors import InputError
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import Declaration, bind, declare, init_params
from scripts.nano.codec import (
    COMMITMENT,
    Codebooks,
    Encoder,
    decode,
    embeddings,
    encode,
    first_books,
    log_mel,
    quantise,
    spectral_loss,
    updated,
)
from scripts.stored_state import restored, save

# A piece of sound, in frames; pieces of a batch.
FRAMES, BATCH = 16, 8
RATE, LAST_RATE, WARMUP = 2e-3, 1e-4, 50
CLIP = 1.0
SAVE_SECONDS, LOG_STEPS = 60, 20
# The share of pieces for which only some of the first codebooks are used.
PARTIAL = 0.5
# What the convolutions at the ends of residual units, and the last of all, begin with, beside the usual scale.
UNIT_GAIN, OUT_GAIN = 0.2, 0.05


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """params: of "encoder" and "code2wav". memory: the optimiser's. books: the codebooks."""

    params: dict
    memory: Any
    books: Codebooks


@dataclass(frozen=True)
class Codec:
    """The two modules that are trained."""

    config: Code2WavConfig
    encoder: Declaration
    vocoder: Declaration

    @classmethod
    def of(cls, config: Code2WavConfig) -> "Codec":
        """The codec of a Code2Wav."""
        return cls(config, declare(Encoder, config.transformer.hidden_size), declare(Code2Wav, config))

    @property
    def piece(self) -> int:
        """Samples of a piece."""
        return FRAMES * self.config.total_upsample

    def begin(self, seed: int, optimizer: Any, waves: np.ndarray) -> State:
        """The state before the first step, with codebooks for waves float32 [B, n]."""
        encoder = init_params(Encoder, self.config.transformer.hidden_size, seed=seed)
        params = {"encoder": encoder, "code2wav": quiet(init_params(Code2Wav, self.config, seed=seed + 1))}
        latents = bind(self.encoder, encoder)(log_mel(jnp.asarray(waves)))
        books = first_books(latents.reshape(-1, latents.shape[-1]), self.config, jax.random.key(seed))
        return State(params, optimizer.init(params), books)


def train_codec(codec: Codec, speech: Path, output: Path, steps: int, seconds: float, seed: int) -> State:
    """Train for at most `steps` steps and `seconds` in all, going on from `output`/codec.npz: the last state."""
    optimizer = _optimizer(steps)
    waves = read_waves(speech, "train")
    first = _pieces(np.random.default_rng(seed), waves, codec.piece, 8 * BATCH)
    state, begin, spent = restored(output / "codec.npz", codec.begin(seed, optimizer, first))
    step = jax.jit(partial(_step, codec, optimizer))
    started = saved = time.monotonic()
    with (output / "codec.csv").open("a") as stream:
        log = csv.writer(stream)
        for number in range(begin, steps):
            draw = np.random.default_rng([seed, number])
            state, losses = step(state, _pieces(draw, waves, codec.piece, BATCH), jax.random.key(number))
            if number % LOG_STEPS == 0 or number == steps - 1:
                values = {name: float(value) for name, value in losses.items()}
                log.writerow([number, round(spent + time.monotonic() - started), *values.values()])
                stream.flush()
                print(number, {name: round(value, 4) for name, value in values.items()}, flush=True)
            now = time.monotonic()
            over = spent + now - started > seconds or number == steps - 1
            if over or now - saved > SAVE_SECONDS:
                save(output / "codec.npz", state, number + 1, spent + now - started)
                saved = now
            if over:
                break
    return state


def trained_codec(codec: Codec, output: Path) -> State:
    """The state that training has left in `output`/codec.npz; InputError if there is none."""
    file = output / "codec.npz"
    if not file.exists():
        raise InputError(f"{file} is missing; run the stage codec first")
    return restored(file, codec.begin(0, _optimizer(1), np.zeros((1, codec.piece), np.float32)))[0]


def read_waves(speech: Path, split: str) -> list[np.ndarray]:
    """The waves of a split, int16 [n] each."""
    import soundfile

    return [soundfile.read(speech / line["audio"], dtype="int16")[0] for line in lines_of(speech, split)]


def lines_of(speech: Path, split: str) -> Iterator[dict[str, str]]:
    """The lines of a split in speech.jsonl."""
    lines = map(json.loads, (speech / "speech.jsonl").read_text().splitlines())
    return (line for line in lines if line["split"] == split)


def write_codes(codec: Codec, state: State, speech: Path) -> None:
    """Write the codes int16 [Q, F] of every wave beside it; their sound is as long or up to a frame longer."""
    import soundfile

    frame = codec.config.total_upsample
    for split in ("train", "test"):
        for line in lines_of(speech, split):
            wave = soundfile.read(speech / line["audio"], dtype="float32")[0]
            frames = -(-len(wave) // frame)
            room = -(-frames // FRAMES) * FRAMES * frame
            padded = np.pad(wave, (0, room - len(wave)))[None]
            given = state.params["encoder"], state.books.entries, jnp.asarray(padded)
            codes = np.asarray(encode(*given, declaration=codec.encoder))[0, :, :frames]
            np.save((speech / line["audio"]).with_suffix(".npy"), codes.astype(np.int16))


def code2wav_params(state: State) -> dict:
    """The parameters of Code2Wav, whose embeddings are the codebooks."""
    return {**state.params["code2wav"], "embed": embeddings(state.books.entries)}


def quiet(params: dict) -> dict:
    """Random parameters of Code2Wav with smaller last convolutions, so that the first sounds are as loud as speech."""
    decoder = dict(params["decoder"])
    for name, block in decoder.items():
        if name.startswith("block_"):
            units = {
                unit: _scaled(part, "conv2", UNIT_GAIN) for unit, part in block.items() if unit.startswith("unit_")
            }
            decoder[name] = {**block, **units}
    return {**params, "decoder": _scaled(decoder, "conv_out", OUT_GAIN)}


def _scaled(params: dict, name: str, gain: float) -> dict:
    convolution = params[name]
    return {**params, name: {**convolution, "weight": gain * convolution["weight"]}}


def _optimizer(steps: int) -> Any:
    import optax

    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, max(steps, WARMUP + 1), LAST_RATE)
    return optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(schedule, b1=0.8, b2=0.99, weight_decay=1e-3))


def _pieces(draw: np.random.Generator, waves: list[np.ndarray], size: int, count: int) -> np.ndarray:
    """Random pieces of random waves, float32 [count, size]; a short wave is followed by silence."""
    out = np.zeros((count, size), np.float32)
    for row, which in zip(out, draw.integers(len(waves), size=count), strict=True):
        wave = waves[which]
        begin = int(draw.integers(max(1, len(wave) - size)))
        part = wave[begin : begin + size]
        row[: len(part)] = part / 32768 * draw.uniform(0.7, 1.2)
    return out


def _step(codec: Codec, optimizer: Any, state: State, wave: jax.Array, key: jax.Array) -> tuple[State, dict]:
    """One step on waves [B, n]."""
    import optax

    B, Q, keys = wave.shape[0], codec.config.num_quantizers, jax.random.split(key, 3)
    few = jax.random.uniform(keys[0], (B,)) < PARTIAL
    used = jnp.repeat(jnp.where(few, jax.random.randint(keys[1], (B,), 1, Q + 1), Q), FRAMES)

    def loss(params: dict) -> tuple[jax.Array, tuple]:
        latents = bind(codec.encoder, params["encoder"])(log_mel(wave))
        rows = latents.reshape(-1, latents.shape[-1])
        found = quantise(jax.lax.stop_gradient(rows), state.books.entries, used)
        value = found.value.reshape(latents.shape)
        # The gradient passes the codebooks as if they were not there.
        through = latents + jax.lax.stop_gradient(value - latents)
        made = decode(params["code2wav"], through, codec.vocoder)
        spectra = spectral_loss(made, wave[:, : made.shape[1]])
        committed = jnp.mean((latents - value) ** 2)
        return spectra + COMMITMENT * committed, (found, {"spectra": spectra, "committed": committed})

    (_, (found, shown)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    changes, memory = optimizer.update(gradient, state.memory, state.params)
    books = updated(state.books, found, used, keys[2])
    params: Any = optax.apply_updates(state.params, changes)
    return State(params, memory, books), shown
