"""The vocoder's parts against transformers' in float32, on small random checkpoints; tests/decode has whole waveforms.

Errors are relative to the scale of the reference's output, as measured at most 1.4e-6 where TOLERANCE is allowed.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.models.code2wav import Code2Wav, Stage
from omni_jax.models.param import declare
from omni_jax.weights.hf import load_hf
from tests.helpers.vocoder import Case

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def load(checkpoints, reference) -> Callable[[str], Case]:
    @cache
    def build(variant: str) -> Case:
        params, config = load_hf(checkpoints(variant), parts=("code2wav",))
        declaration = declare(Code2Wav, config.code2wav)
        return Case(config.code2wav, params["code2wav"], declaration, reference(variant).code2wav)

    return build


@pytest.fixture(params=["tiny", "small", "odd"])
def case(request, load) -> Case:
    return load(request.param)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x.transpose(0, 2, 1))


def assert_close(ours: Any, theirs: torch.Tensor) -> None:
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


def beginning(frames: int) -> Stage:
    """A chunk of `frames` frames that is a row's first."""
    return Stage(jnp.int32(0), jnp.int32(frames), None)


def test_embeddings_are_means_over_codebooks(case: Case) -> None:
    c, theirs = case.config, case.reference
    codes = np.random.default_rng(0).integers(0, c.codebook_size, (2, c.num_quantizers, 9)).astype(np.int32)
    want = theirs.code_embedding(torch.tensor(codes) + theirs.code_offset).mean(1)
    assert_close(case.run(lambda m: m.embed_codes(codes)), want)


@pytest.mark.parametrize("rows,frames", [(1, 50), (2, 21), (1, 1)])
def test_transformer(case: Case, rows: int, frames: int) -> None:
    x = normal(rows, frames, case.config.transformer.hidden_size)
    ours = case.run(lambda m: m.attend(x, m.start(rows), frames)[0])
    assert_close(ours, case.reference.pre_transformer(inputs_embeds=torch.tensor(x)).last_hidden_state)


def test_transformer_with_the_public_window(load) -> None:
    """170 frames with a window of 72, from the first on and behind 100 others."""
    tiny, window = load("tiny"), 72
    config = dataclasses.replace(
        tiny.config, transformer=dataclasses.replace(tiny.config.transformer, sliding_window=window)
    )
    ours = dataclasses.replace(tiny, config=config, declaration=declare(Code2Wav, config))
    theirs = copy.deepcopy(tiny.reference.pre_transformer)
    theirs.config.sliding_window = theirs.window_size = window
    x = normal(1, 170, config.transformer.hidden_size)
    want = theirs(inputs_embeds=torch.tensor(x)).last_hidden_state

    def in_two(m: Code2Wav, x: jax.Array) -> jax.Array:
        first, k, v = m.attend(x[:, :100], m.start(1), 100)
        state = dataclasses.replace(m.start(1), frames=jnp.int32(100), k=k, v=v)
        return jnp.concatenate([first, m.attend(x[:, 100:], state, 70)[0]], axis=1)

    assert_close(ours.run(lambda m: m.attend(x, m.start(1), 170)[0]), want)
    assert_close(ours.run(in_two, x), want)
    narrow = tiny.reference.pre_transformer(inputs_embeds=torch.tensor(x)).last_hidden_state
    assert (narrow - want).abs().max() > 100 * TOLERANCE * want.abs().max()


def test_upsampling_stages(case: Case) -> None:
    x = normal(2, 12, case.config.transformer.hidden_size)

    def stages(m: Code2Wav) -> list[jax.Array]:
        y, stage, outputs = x, beginning(12), []
        for i in range(m.upsample.stages):
            y, stage = getattr(m.upsample, f"stage_{i}")(y, stage)
            outputs.append(y)
        return outputs

    hidden = channels_first(x)
    for ours, (conv, block) in zip(case.run(stages), case.reference.upsample, strict=True):
        hidden = block(conv(hidden))
        assert_close(ours.transpose(0, 2, 1), hidden)
    assert hidden.shape[2] == 12 * np.prod(case.config.upsampling_ratios)


def test_a_quiet_signal_shows_the_norms_epsilon(load) -> None:
    """What reaches the ConvNeXt norm has a variance of about 1e-6 here, as much as is added to it."""
    odd, quiet = load("odd"), 1e-3
    conv, block = copy.deepcopy(odd.reference.upsample[0])
    block.dwconv.conv.weight *= quiet
    block.dwconv.conv.bias *= quiet
    stage = dict(odd.params["upsample"]["stage_0"])
    stage["dwconv"] = {name: quiet * p for name, p in stage["dwconv"].items()}
    params = {**odd.params, "upsample": {**odd.params["upsample"], "stage_0": stage}}
    x = normal(1, 12, odd.config.transformer.hidden_size)
    ours = dataclasses.replace(odd, params=params).run(lambda m: m.upsample.stage_0(x, beginning(12))[0])
    assert_close(ours.transpose(0, 2, 1), block(conv(channels_first(x))))


def test_decoder_blocks(case: Case) -> None:
    """Each block gives silence for what lies before the sound's beginning, then what the reference's block gives."""
    x, stage = normal(2, 40, case.config.transformer.hidden_size), beginning(40)

    def stages(m: Code2Wav) -> list[jax.Array]:
        y, stage = m.decoder.conv_in(x, beginning(40))
        outputs = [y]
        for i in range(m.decoder.blocks):
            y, stage = getattr(m.decoder, f"block_{i}")(y, stage)
            outputs.append(y)
        return [*outputs, m.decoder(x, beginning(40))[0]]

    conv_in, *ours, wave = case.run(stages)
    first, *blocks, snake, last = case.reference.decoder
    hidden = first(channels_first(x))
    assert_close(conv_in.transpose(0, 2, 1), hidden)
    for y, block, rate in zip(ours, blocks, case.config.upsample_rates, strict=True):
        stage, hidden = stage.upsampled(rate, look_back=1), block(hidden)
        assert y.shape[1] == 40 * stage.rate and not y[:, : stage.lost].any()
        assert_close(y[:, stage.lost :].transpose(0, 2, 1), hidden)
    assert stage.lost == case.config.lost_samples
    assert wave.dtype == jnp.float32
    assert_close(wave[:, stage.lost :], last(snake(hidden))[:, 0])


def test_silence_ends_where_sound_begins_and_never_returns() -> None:
    x = jnp.ones((1, 12, 1))
    for frames, left in ((0, 7), (1, 3), (2, 0), (1000, 0), (2**31 - 1, 0)):
        stage = Stage(jnp.int32(frames), jnp.int32(3), None, rate=4, lost=7)
        assert (np.asarray(stage.silence(x))[0, :, 0] == (np.arange(12) >= left)).all()


def test_padding_leaves_nothing_in_the_state(load) -> None:
    case = load("odd")
    c = case.config
    codes = np.random.default_rng(1).integers(0, c.codebook_size, (2, c.num_quantizers, 10)).astype(np.int32)
    codes[1, :, :6] = codes[0, :, :6]
    sound = case.run(lambda m: m(codes, m.start(2), 6))
    (one, two), state = sound.wave, sound.state
    heard = 6 * c.total_upsample
    np.testing.assert_array_equal(one[:heard], two[:heard])
    assert np.abs(one[heard:] - two[heard:]).max() > 1e-3
    assert int(state.frames) == 6
    for array, rows in ((state.k, 1), (state.v, 1), *((tail, 0) for tail in state.tails)):
        first, second = np.split(np.asarray(array), 2, axis=rows)
        assert first.any()
        np.testing.assert_array_equal(first, second)
