"""The audio encoder against transformers' in float32, on small random checkpoints.

Errors are relative to the scale of the reference's output. Measured: at most 0.9e-6 where the tests allow TOLERANCE,
0.6e-6 between two shapes of the same call, where they allow NOISE (other shapes sum in another order).
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

from omni_jax.config import AudioConfig
from omni_jax.inputs.batch import AudioWindows, pack_audio
from omni_jax.models import audio, encoder
from omni_jax.models.audio import AudioEncoder, sinusoids, steps
from omni_jax.models.param import bind, declare
from omni_jax.ops.gelu import gelu_tanh
from omni_jax.sharding import make_mesh, shardings
from omni_jax.weights.hf import load_hf
from tests.helpers.encoder import Case

TOLERANCE = 1e-5
NOISE = 2e-6
# Mel frames of the clips, 10 ms each: several windows, about one chunk (97 to 104 frames), 0.3 s and a single frame.
LONG, MEDIUM, SHORT = (871, 250), (104, 187, 97), (30, 1, 60)


def make_encode(config: AudioConfig) -> Callable[..., jax.Array]:
    declaration = declare(AudioEncoder, config)
    return jax.jit(lambda params, mel, frames, width: bind(declaration, params)(mel, frames, width))


@pytest.fixture(scope="module")
def load(checkpoints, reference) -> Callable[[str], Case]:
    @cache
    def build(variant: str) -> Case:
        params, config = load_hf(checkpoints(variant), parts=("thinker",))
        tower = reference(variant).thinker.model.audio_tower
        return Case(config.thinker.audio, params["thinker"]["audio"], tower, make_encode(config.thinker.audio))

    return build


@pytest.fixture(params=["tiny", "small", "odd"])
def case(request, load) -> Case:
    return load(request.param)


@pytest.fixture
def tiny(load) -> Case:
    return load("tiny")


def clips(config: AudioConfig, *frames: int, seed: int = 0) -> list[np.ndarray]:
    """Random log-mels [M, frames]."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(config.mel_bins, n)).astype(np.float32) for n in frames]


def encode(case: Case, windows: AudioWindows, **changes: np.ndarray) -> np.ndarray:
    """All tokens of the windows, padding included, [tokens, out]."""
    w = dataclasses.replace(windows, **changes)
    out = case.encode(case.params, w.mel, w.frames, w.width)
    return np.asarray(out).reshape(-1, out.shape[-1])


def ours(case: Case, mels: list[np.ndarray]) -> list[np.ndarray]:
    """Tokens of every clip, all in one call."""
    windows, indices = pack_audio(mels, case.config)
    assert windows is not None
    flat = encode(case, windows)
    return [flat[index] for index in indices]


def theirs(case: Case, mels: list[np.ndarray]) -> list[np.ndarray]:
    """The reference's tokens of every clip, all in one call."""
    lengths = torch.tensor([mel.shape[1] for mel in mels])
    with torch.no_grad():
        out = case.reference(torch.tensor(np.concatenate(mels, axis=1)), lengths).last_hidden_state.numpy()
    config = case.config
    counts = [int(n) for n in _get_feat_extract_output_lengths(lengths, config.n_window)]
    return np.split(out, np.cumsum(counts)[:-1])


def alone(case: Case, mels: list[np.ndarray]) -> list[np.ndarray]:
    """The reference's tokens of every clip, each in a call of its own."""
    return [theirs(case, [mel])[0] for mel in mels]


def error(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    """Largest difference relative to the scale of `want`, the worst of all clips."""
    assert [g.shape for g in got] == [w.shape for w in want]
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


def test_clips_of_all_lengths_in_one_batch_match_each_alone(case):
    mels = clips(case.config, *LONG, *SHORT, *MEDIUM)
    assert error(ours(case, mels), alone(case, mels)) < TOLERANCE


def test_clips_of_at_least_a_chunk_match_the_reference_batch(case):
    mels = [mel for mel in clips(case.config, *LONG, *MEDIUM) if mel.shape[1] >= case.config.chunk_frames]
    assert len(mels) > 2
    assert error(ours(case, mels), theirs(case, mels)) < TOLERANCE


def test_a_short_clip_follows_its_width_not_its_neighbours(case):
    """The reference's defect, understood: beside a longer clip it computes as if every width were a whole chunk."""
    mels = clips(case.config, *SHORT, *LONG)
    windows, indices = pack_audio(mels, case.config)
    assert windows is not None
    whole = np.where(windows.frames > 0, case.config.chunk_frames, 0).astype(np.int32)
    flat, batch, single = encode(case, windows, width=whole), theirs(case, mels), alone(case, mels)
    assert error([flat[i] for i in indices], batch) < TOLERANCE
    assert error(single, batch) > 100 * TOLERANCE


def test_short_clips_together_match_the_reference_batch_when_told_its_width(tiny):
    """Without any whole chunk in the call, the reference's width is the longest clip's."""
    mels = clips(tiny.config, 30, 62, 9)
    windows, indices = pack_audio(mels, tiny.config)
    assert windows is not None
    flat = encode(tiny, windows, width=np.where(windows.frames > 0, 62, 0).astype(np.int32))
    assert error([flat[i] for i in indices], theirs(tiny, mels)) < TOLERANCE


def test_neighbours_and_padding_do_not_change_a_clip(tiny):
    mels = clips(tiny.config, 230, 30)
    got = ours(tiny, mels)
    crowd = ours(tiny, mels + clips(tiny.config, *LONG, *SHORT, seed=1))
    assert error(crowd[: len(mels)], got) < NOISE


def test_values_in_the_padding_are_never_read(tiny):
    mels = clips(tiny.config, 230, 30)
    windows, indices = pack_audio(mels, tiny.config)
    assert windows is not None
    noisy = np.where(windows.frames[:, :, None, None] > 0, windows.mel, 1e3).astype(np.float32)
    used = np.concatenate(indices)
    np.testing.assert_array_equal(encode(tiny, windows, mel=noisy)[used], encode(tiny, windows)[used])


def test_tokens_are_a_prefix_of_each_window_and_padding_stays_finite(tiny):
    windows, indices = pack_audio(clips(tiny.config, 871, 30), tiny.config)
    assert windows is not None
    W, C = windows.frames.shape
    flat = encode(tiny, windows)
    assert flat.shape == (W * C * 13, tiny.config.out_hidden_size) and np.isfinite(flat).all()
    lengths = steps(windows.frames).sum(axis=1)
    prefixes = np.concatenate([w * C * 13 + np.arange(n) for w, n in enumerate(lengths)])
    assert np.array_equal(prefixes, np.concatenate(indices))


def test_clips_of_any_length_share_one_program(tiny):
    encode = make_encode(tiny.config)
    for frames in (401, 520, 790, 800):
        windows, _ = pack_audio(clips(tiny.config, frames), tiny.config)
        assert windows is not None
        encode(tiny.params, windows.mel, windows.frames, windows.width)
    assert encode._cache_size() == 1


def test_many_chunks_pass_the_convolutions_in_groups(tiny, monkeypatch):
    mels = clips(tiny.config, 871, 30)
    want = ours(tiny, mels)
    config = tiny.config
    numbers = config.conv_channels * audio.halve(config.mel_bins) * audio.halve(config.chunk_frames)
    monkeypatch.setattr(audio, "CONV_NUMBERS", 5 * numbers)  # of 16 chunks: three groups and a rest
    assert error(ours(dataclasses.replace(tiny, encode=make_encode(tiny.config)), mels), want) < NOISE


def test_gradients_are_finite_and_reach_every_parameter(tiny):
    windows, indices = pack_audio(clips(tiny.config, 230, 30), tiny.config)
    assert windows is not None
    used = np.concatenate(indices)

    def loss(params: dict) -> jax.Array:
        out = tiny.encode(params, windows.mel, windows.frames, windows.width)
        return jnp.sum(jnp.square(out.reshape(-1, out.shape[-1])[used]))

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(tiny.params)):
        assert np.isfinite(gradient).all() and np.any(gradient), path


def test_bfloat16_stays_near_float32(tiny):
    """Not a parity tolerance: 8 bits kept after every operation measured 0.9 % of the output, root mean square."""
    mels = clips(tiny.config, *LONG, *SHORT)
    half = dataclasses.replace(tiny, params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny.params))
    got, want = (np.concatenate(ours(c, mels)) for c in (half, tiny))
    assert got.dtype == jnp.bfloat16 and np.isfinite(got.astype(np.float32)).all()
    difference = got.astype(np.float32) - want
    assert np.sqrt(np.mean(np.square(difference)) / np.mean(np.square(want))) < 0.03


def test_a_mesh_does_not_change_the_result(tiny):
    """Windows split over two devices, heads and MLPs over two more."""
    windows, indices = pack_audio(clips(tiny.config, 871, 30), tiny.config)
    assert windows is not None
    mesh = make_mesh(jax.devices()[:4], data=2, tensor=2)
    params = jax.device_put(tiny.params, shardings(declare(AudioEncoder, tiny.config).axes, mesh))
    split = jax.device_put(dataclasses.astuple(windows), NamedSharding(mesh, PartitionSpec("data")))
    got = np.asarray(tiny.encode(params, *split)).reshape(-1, tiny.config.out_hidden_size)
    used = np.concatenate(indices)
    assert error([got[used]], [encode(tiny, windows)[used]]) < NOISE


# Parts


@pytest.mark.parametrize("n_window", [49, 50, 51, 52])
def test_token_counts_follow_the_reference(n_window):
    chunk = 2 * n_window
    assert steps(chunk) == 13 and steps(0) == 0
    counts = [steps(n) for n in range(1, chunk)]
    assert counts == [int(_get_feat_extract_output_lengths(torch.tensor(n), n_window)) for n in range(1, chunk)]


def test_sinusoids_equal_the_reference_table(case):
    table = case.reference.positional_embedding.positional_embedding[:13].numpy()
    np.testing.assert_allclose(sinusoids(*table.shape), table, atol=2e-6)


# Defects of other ports: each is put into our code, and must move the result far beyond the tolerance.


def across_rows(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    """All tokens of the call see each other, as when windows are ignored."""
    one = (a.reshape(1, -1, *a.shape[2:]) for a in (q, k, v))
    return ATTEND(*one, lengths.sum()[None]).reshape(q.shape)


def within_chunks(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    chunks = [a.reshape(-1, 13, *a.shape[2:]) for a in (q, k, v)]
    return ATTEND(*chunks, jnp.full(len(chunks[0]), 13)).reshape(q.shape)


def everywhere_valid(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
    return ATTEND(q, k, v, jnp.full_like(lengths, q.shape[1]))


ATTEND = encoder.attend_in_rows
# What is patched, and the clips in windows that show it; across_rows needs windows that are full.
DEFECTS: dict[str, tuple[Any, str, Any, tuple[float, ...]]] = {
    "window ignored": (encoder, "attend_in_rows", across_rows, (2,)),
    "attention across clips": (encoder, "attend_in_rows", across_rows, (1, 1)),
    "windows of one second": (encoder, "attend_in_rows", within_chunks, (2,)),
    "padding attended to": (encoder, "attend_in_rows", everywhere_valid, (1.6, 0.4)),
    "tanh GELU": (audio, "gelu_exact", gelu_tanh, (2,)),
    "sinusoids left out": (audio, "sinusoids", lambda length, width: np.zeros((length, width)), (2,)),
    "sinusoids from one": (audio, "sinusoids", lambda length, width: sinusoids(length + 1, width)[1:], (2,)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_of_other_ports_would_be_seen(tiny, monkeypatch, defect):
    *patch, windows = DEFECTS[defect]
    window = tiny.config.window_chunks * tiny.config.chunk_frames
    mels = clips(tiny.config, *(int(n * window) for n in windows))
    assert error(ours(tiny, mels), want := alone(tiny, mels)) < TOLERANCE
    monkeypatch.setattr(*patch)
    assert error(ours(dataclasses.replace(tiny, encode=make_encode(tiny.config)), mels), want) > 10 * TOLERANCE


def flattened_band_major(params: dict) -> dict:
    """conv_out read as if the convolutions' features were flattened (band, channel) instead of (channel, band)."""
    weight, channels = params["conv_out"]["weight"], params["conv3"]["bias"].shape[0]
    swapped = weight.reshape(weight.shape[0], channels, -1).swapaxes(1, 2).reshape(weight.shape)
    return params | {"conv_out": {"weight": swapped}}


def transposed_kernels(params: dict) -> dict:
    """Kernels laid out for (time, mel) and applied to (mel, time)."""
    names = ("conv1", "conv2", "conv3")
    return params | {n: params[n] | {"weight": params[n]["weight"].swapaxes(2, 3)} for n in names}


def without_key_bias(params: dict) -> dict:
    """A missing key bias: the softmax does not see it, so this one must not change the result."""
    qkv = params["blocks"]["qkv"]
    return params | {"blocks": params["blocks"] | {"qkv": qkv | {"bias": jnp.asarray(qkv["bias"]).at[:, 1].set(0)}}}


@pytest.mark.parametrize("defect", [flattened_band_major, transposed_kernels])
def test_weights_in_another_order_would_be_seen(tiny, defect):
    mels = clips(tiny.config, 250, 30)
    assert error(ours(dataclasses.replace(tiny, params=defect(tiny.params)), mels), alone(tiny, mels)) > 0.1


def test_the_key_bias_changes_nothing(tiny):
    mels = clips(tiny.config, 250, 30)
    assert error(ours(dataclasses.replace(tiny, params=without_key_bias(tiny.params)), mels), ours(tiny, mels)) < 1e-5


def quieten(case: Case) -> Case:
    """The same encoder, here and in transformers, with all that enters the residual stream divided by 1000."""
    reference = copy.deepcopy(case.reference)
    reference.positional_embedding.positional_embedding.zero_()
    added = re.compile(r"conv_out|layers\.\d+\.(self_attn\.out_proj|fc2)\.")
    for name, parameter in reference.named_parameters():
        if added.match(name):
            parameter.data.mul_(1e-3)

    def small(tree: dict) -> dict:
        return jax.tree.map(lambda p: p * 1e-3, tree)

    blocks = case.params["blocks"]
    blocks = blocks | {name: small(blocks[name]) for name in ("out", "fc2")}
    params = case.params | {"conv_out": small(case.params["conv_out"]), "blocks": blocks}
    return dataclasses.replace(case, params=params, reference=reference, encode=make_encode(case.config))


def test_layer_norm_epsilon_matches_on_quiet_activations(tiny, monkeypatch):
    """Activations of a thousandth have the variance of the epsilon, which then matters in every norm."""
    monkeypatch.setattr(audio, "sinusoids", lambda length, width: np.zeros((length, width)))
    quiet, mels = quieten(tiny), clips(tiny.config, 250, 30)
    assert error(ours(quiet, mels), want := alone(quiet, mels)) < TOLERANCE
    monkeypatch.setattr(audio, "NORM_EPS", 1e-6)
    assert error(ours(dataclasses.replace(quiet, encode=make_encode(tiny.config)), mels), want) > 1000 * TOLERANCE
