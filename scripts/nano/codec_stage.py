"""The stage codec: train encoder, codebooks and Code2Wav on what the speakers say, and write the codes of all of it.

    speech/<speaker>/<word>.wav -> sentences -> crops of FRAMES frames -> step -> codec.npz, codec.csv
    codec.npz -> speech/<speaker>.npz, speech/codes.json, code2wav parameters for the model

The learning rate follows the steps; seconds only pause, and the same call goes on with the same result. Lines of
codec.csv: step, seconds so far, spectral loss, commitment loss.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import Code2WavConfig
from omni_jax.errors import InputError
from omni_jax.files import write_whole
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import Declaration, bind, declare, init_params
from omni_jax.train.optimizer import optimizer_of
from omni_jax.train.settings import Optimizer
from scripts.nano.codec import (
    COMMITMENT,
    Codebooks,
    Encoder,
    decode,
    embeddings,
    encode,
    first_codebooks,
    log_mel,
    quantise,
    spectral_loss,
    updated,
)
from scripts.nano.origin import check_origin, digest_of
from scripts.nano.speech import FRAME, VOICES, of_words, read_clips
from scripts.stored_state import log_file, restored, take_steps

# A crop of sound, in frames; crops of a batch.
# No more frames than `ops.attention.FEW_QUERIES`: what comes after a state has no backward pass for more.
FRAMES, BATCH = 16, 8
SETTINGS = Optimizer(
    optimizer="muon", learning_rate=8e-3, warmup_ratio=0.02, final_ratio=0.03, weight_decay=1e-3, beta1=0.9, beta2=0.98
)
CODES = "codes.json"
# The share of crops for which only some of the first codebooks are used (quantiser dropout).
DROPOUT = 0.5
# What the convolutions at the ends of residual units, and the last of all, begin with, beside the usual scale.
UNIT_GAIN, OUT_GAIN = 0.2, 0.05


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """params: of "encoder" and "code2wav"."""

    params: dict
    optimizer: Any
    codebooks: Codebooks


@dataclass(frozen=True)
class CodecModules:
    """The two modules that are trained."""

    config: Code2WavConfig
    encoder: Declaration
    vocoder: Declaration

    @classmethod
    def of(cls, config: Code2WavConfig) -> "CodecModules":
        """The codec of a Code2Wav."""
        return cls(config, declare(Encoder, config.transformer.hidden_size), declare(Code2Wav, config))

    @property
    def crop(self) -> int:
        """Samples of a crop."""
        return FRAMES * self.config.total_upsample

    def optimizer(self, steps: int) -> Any:
        """What trains both, for a training of so many steps."""
        return optimizer_of(SETTINGS, steps, {"encoder": self.encoder.axes, "code2wav": self.vocoder.axes})

    def begin(self, seed: int, optimizer: Any, waves: np.ndarray) -> State:
        """The state before the first step, with codebooks for waves float32 [B, n]."""
        encoder = init_params(Encoder, self.config.transformer.hidden_size, seed=seed)
        params = {"encoder": encoder, "code2wav": quiet(init_params(Code2Wav, self.config, seed=seed + 1))}
        latents = bind(self.encoder, encoder)(log_mel(jnp.asarray(waves)))
        codebooks = first_codebooks(latents.reshape(-1, latents.shape[-1]), self.config, jax.random.key(seed))
        return State(params, optimizer.init(params), codebooks)


def train_codec(codec: CodecModules, directory: Path, steps: int, seconds: float, seed: int) -> tuple[State, int]:
    """Train up to step `steps`, going on from codec.npz, or for `seconds`: the state and its step.

    InputError for the state of another training.
    """
    file, speech, optimizer = directory / "codec.npz", directory / "speech", codec.optimizer(steps)
    origin = {"speech/speech.jsonl": digest_of([speech / "speech.jsonl"]), "steps": steps, "seed": seed}
    check_origin(directory, "codec", [file], origin)
    waves = read_waves(speech, "train")
    first = _crops(np.random.default_rng(seed), waves, codec.crop, 8 * BATCH)
    state, begin, spent = restored(file, codec.begin(seed, optimizer, first))
    step, key = _program(codec, steps), jax.random.key(seed)

    def advance(state: State, number: int) -> tuple[State, dict]:
        crops = _crops(np.random.default_rng([seed, number]), waves, codec.crop, BATCH)
        return step(state, crops, jax.random.fold_in(key, number))

    with log_file(directory / "codec.csv", begin) as stream:
        log = partial(_write_losses, stream)
        return take_steps(file, state, range(begin, steps), spent, seconds, advance, log)


def _write_losses(stream: IO[str], number: int, seconds: float, losses: dict[str, jax.Array]) -> None:
    values = {name: float(losses[name]) for name in ("spectra", "committed")}
    csv.writer(stream).writerow([number, round(seconds), *values.values()])
    stream.flush()
    print(number, {name: round(value, 4) for name, value in values.items()}, flush=True)


def trained_codec(codec: CodecModules, directory: Path) -> State:
    """The state that training has left in codec.npz; InputError if there is none."""
    file = directory / "codec.npz"
    if not file.exists():
        raise InputError(f"{file} is missing; run the stage codec first")
    return restored(file, codec.begin(0, codec.optimizer(1), np.zeros((1, codec.crop), np.float32)))[0]


def read_waves(speech: Path, split: str) -> list[Sequence[np.ndarray]]:
    """The sentences of a split, each as what is said of its words, int16 [n] each."""
    clips = read_clips(speech)
    return [of_words(line["text"], clips[line["speaker"]]) for line in lines_of(speech, split)]


def lines_of(speech: Path, split: str) -> Iterator[dict[str, str]]:
    """The lines of a split in speech.jsonl."""
    lines = map(json.loads, (speech / "speech.jsonl").read_text().splitlines())
    return (line for line in lines if line["split"] == split)


def write_codes(codec: CodecModules, state: State, directory: Path) -> None:
    """Write the codes of every word, each of which is encoded by itself, into a file for each speaker.

    codes.json, written last, says of which codec and sentences they are; codes of these are left as they are.
    """
    speech, origin = directory / "speech", _codes_origin(directory)
    if _held_codes(speech) == origin:
        return
    (speech / CODES).unlink(missing_ok=True)
    for speaker, clips in read_clips(speech).items():
        # savez has arguments of its own, which no word must name.
        codes: Any = {f"word {word}": _codes(codec, state, wave) for word, wave in clips.items()}
        np.savez(speech / f"{speaker}.npz", **codes)
    write_whole(speech / CODES, json.dumps(origin) + "\n")


def read_codes(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    """The codes int16 [Q, F] of each speaker's words and pauses; errors as `codes_digest`."""
    codes_digest(directory)
    found = {}
    for speaker in VOICES:
        with np.load(directory / "speech" / f"{speaker}.npz") as held:
            found[speaker] = {name.removeprefix("word "): held[name] for name in held.files}
    return found


def codes_digest(directory: Path) -> str:
    """What identifies the codes of all sentences; InputError if they are not there, or are of an earlier codec."""
    if (origin := _codes_origin(directory)) != _held_codes(directory / "speech"):
        raise InputError(
            f"{directory / 'speech'} lacks codes of the trained codec; run the stage codec to its end first"
        )
    return " ".join(origin.values())


def _codes_origin(directory: Path) -> dict[str, str]:
    return {name: digest_of([directory / name]) for name in ("codec.npz", "speech/speech.jsonl")}


def _held_codes(speech: Path) -> dict[str, str] | None:
    return json.loads((speech / CODES).read_text()) if (speech / CODES).exists() else None


def _codes(codec: CodecModules, state: State, wave: np.ndarray) -> np.ndarray:
    """The codes int16 [Q, F] of a wave int16 [F * FRAME]."""
    frames = len(wave) // FRAME
    room = -(-frames // FRAMES) * FRAMES * FRAME
    padded = jnp.asarray(np.pad(wave / 32768, (0, room - len(wave)))[None], jnp.float32)
    codes = encode(state.params["encoder"], state.codebooks.entries, padded, declaration=codec.encoder)
    return np.asarray(codes, np.int16)[0, :, :frames]


def code2wav_params(state: State) -> dict:
    """The parameters of Code2Wav, whose embeddings are the codebooks."""
    return {**state.params["code2wav"], "embed": embeddings(state.codebooks.entries)}


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


@lru_cache(1)
def _program(codec: CodecModules, steps: int) -> Any:
    """One step of a training of so many, compiled once."""
    return jax.jit(partial(_step, codec, codec.optimizer(steps)))


def _crops(draw: np.random.Generator, waves: list[Sequence[np.ndarray]], size: int, count: int) -> np.ndarray:
    """Random crops of random sentences, float32 [count, size]; a short one is followed by silence."""
    out = np.zeros((count, size), np.float32)
    for row, which in zip(out, draw.integers(len(waves), size=count), strict=True):
        wave = np.concatenate(waves[which])
        begin = int(draw.integers(max(1, len(wave) - size)))
        part = wave[begin : begin + size]
        row[: len(part)] = part / 32768 * draw.uniform(0.7, 1.2)
    return out


def _step(codec: CodecModules, optimizer: Any, state: State, wave: jax.Array, key: jax.Array) -> tuple[State, dict]:
    """One step on waves [B, n]."""
    import optax

    B, Q, keys = wave.shape[0], codec.config.num_quantizers, jax.random.split(key, 3)
    few = jax.random.uniform(keys[0], (B,)) < DROPOUT
    quantisers = jnp.repeat(jnp.where(few, jax.random.randint(keys[1], (B,), 1, Q + 1), Q), FRAMES)

    def loss(params: dict) -> tuple[jax.Array, tuple]:
        latents = bind(codec.encoder, params["encoder"])(log_mel(wave))
        rows = latents.reshape(-1, latents.shape[-1])
        found = quantise(jax.lax.stop_gradient(rows), state.codebooks.entries, quantisers)
        value = found.value.reshape(latents.shape)
        # The gradient passes the codebooks as if they were not there.
        through = latents + jax.lax.stop_gradient(value - latents)
        made = decode(params["code2wav"], through, codec.vocoder)
        spectra = spectral_loss(made, wave[:, : made.shape[1]])
        committed = jnp.mean((latents - value) ** 2)
        return spectra + COMMITMENT * committed, (found, {"spectra": spectra, "committed": committed})

    (_, (found, shown)), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    changes, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    codebooks = updated(state.codebooks, found, quantisers, keys[2])
    params: Any = optax.apply_updates(state.params, changes)
    return State(params, optimizer_state, codebooks), shown
