"""Sound from codes against transformers' in float32 on small random checkpoints, whole, in pieces and streamed.

Samples lie in [-1, 1]. Measured on 330 frames: at most 1.1e-5 against transformers, where the tests allow TOLERANCE,
and 1.0e-5 between ways of cutting the same codes, where sums run in another order and the tests allow NOISE.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.decode.shares import compilations
from omni_jax.decode.speech.vocode import (
    LONG,
    LONG_FROM,
    MAX_FRAMES,
    SHORT,
    Vocoder,
    _chunks,
    samples_of,
    vocode,
    vocode_chunk,
    vocode_like_reference,
)
from omni_jax.errors import ConfigError, InputError
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import declare
from omni_jax.weights.hf import load_hf
from tests.helpers.vocoder import Case

TOLERANCE = 3e-5
NOISE = 2e-5


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


@pytest.fixture
def odd(load) -> Case:
    return load("odd")


def stream(case: Case, codes: np.ndarray, pieces: Sequence[int]) -> list[np.ndarray]:
    """The samples that a stream of codes [Q, F] gives for each piece; the last number repeats until all are heard."""
    vocoder, waves, begin = Vocoder(*case.model), [], 0
    while begin < codes.shape[1]:
        n = pieces[min(len(waves), len(pieces) - 1)]
        waves.append(vocoder.add(codes[:, begin : begin + n]))
        begin += n
    return [*waves, vocoder.finish()]


def test_later_chunks_of_a_loaded_model_compile_nothing(odd: Case) -> None:
    params, declaration, config = odd.model
    loaded = jax.device_put(params, jax.devices()[0])
    vocoder, codes = Vocoder(loaded, declaration, config), odd.codes(SHORT)[0]
    vocoder.add(codes)
    with compilations() as compiled:
        vocoder.add(codes)
    assert not compiled


@pytest.mark.parametrize("frames", [85])
def test_whole_sound(case: Case, frames: int) -> None:
    codes = case.codes(frames)
    (ours,), (want,) = vocode(*case.model, codes), case.theirs(codes)
    assert ours.dtype == np.float32 and ours.shape == want.shape == (samples_of(case.config, frames),)
    assert want.std() > 0.05 and np.abs(want).max() <= 1
    np.testing.assert_allclose(ours, want, rtol=0, atol=TOLERANCE)


def test_three_hundred_frames_behind_twenty_five(load) -> None:
    """The reference's chunks, with two seams; what it loses there is lost."""
    tiny = load("tiny")
    codes = tiny.codes(640)
    (ours,), (want,) = vocode_like_reference(*tiny.model, codes), tiny.theirs(codes, 300, 25)
    assert ours.shape == want.shape == (640 * tiny.config.total_upsample - 3 * tiny.config.lost_samples,)
    np.testing.assert_allclose(ours, want, rtol=0, atol=TOLERANCE)
    (whole,) = vocode(*tiny.model, codes)
    assert len(whole) == len(ours) + 2 * tiny.config.lost_samples
    second = 300 * tiny.config.total_upsample
    assert np.abs(whole[second:][:10_000] - ours[second - tiny.config.lost_samples :][:10_000]).max() > 1e-3


@pytest.mark.parametrize("piece,context", [(20, 3), (16, 16), (7, 10), (64, 0)])
def test_pieces_of_other_sizes(odd: Case, piece: int, context: int) -> None:
    codes = odd.codes(61)
    (ours,) = vocode_like_reference(*odd.model, codes, piece=piece, context=context)
    (want,) = odd.theirs(codes, piece, context)
    np.testing.assert_allclose(ours, want, rtol=0, atol=TOLERANCE)


def test_pieces_of_unequal_rows_are_those_of_each_row(odd: Case) -> None:
    codes, lengths = odd.codes(41, rows=3), (41, 23, 0)
    ours = vocode_like_reference(*odd.model, codes, lengths, piece=20, context=5)
    for row, n, wave in zip(codes, lengths, ours, strict=True):
        want = odd.theirs(row[None, :, :n], 20, 5)[0] if n else np.zeros(0)
        assert wave.shape == want.shape
        np.testing.assert_allclose(wave, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pieces", [[1], [7], [25], [300], [3, 0, 1, 40, 2, 17, 64, 5, 100]], ids=str)
def test_a_stream_is_the_whole_sound(load, pieces: list[int]) -> None:
    """330 frames on a window of 20, cut in many ways, are bit for bit one piece, which equals the reference."""
    tiny = load("tiny")
    codes = tiny.codes(330, seed=1)[0]
    waves = stream(tiny, codes, pieces)
    heard = next(i for i, wave in enumerate(waves) if wave.size)
    assert sum((pieces[-1:] * SHORT if len(pieces) == 1 else pieces)[:heard]) < SHORT, "a full chunk is heard at once"
    ours, (whole,) = np.concatenate(waves), vocode(*tiny.model, codes[None])
    assert ours.dtype == np.float32 and ours.shape == whole.shape
    np.testing.assert_array_equal(ours, whole)


@pytest.mark.parametrize("pieces", [[1], [5, 9, 16]], ids=str)
def test_a_stream_of_other_models_is_the_references_sound(case: Case, pieces: list[int]) -> None:
    codes = case.codes(47, seed=2)
    ours, want = np.concatenate(stream(case, codes[0], pieces)), case.theirs(codes)[0]
    assert ours.shape == want.shape
    np.testing.assert_allclose(ours, want, rtol=0, atol=TOLERANCE)


def test_rows_are_what_they_are_alone(odd: Case) -> None:
    codes, lengths = odd.codes(90, rows=3, seed=3), np.asarray([90, 1, 35])
    codes[1, :, 1:] = -1  # Whatever stands behind a row's length is not looked at.
    together = vocode(*odd.model, codes, lengths)
    for row, n, wave in zip(codes, lengths, together, strict=True):
        (alone,) = vocode(*odd.model, row[None, :, :n])
        assert wave.shape == alone.shape == (samples_of(odd.config, n),)
        np.testing.assert_allclose(wave, alone, rtol=0, atol=NOISE)


def test_rows_stream_side_by_side(odd: Case) -> None:
    codes = odd.codes(21, rows=3, seed=4)
    vocoder = Vocoder(*odd.model, rows=3)
    waves = [vocoder.add(codes[:, :, :16]), vocoder.add(codes[:, :, 16:]), vocoder.finish()]
    np.testing.assert_array_equal(np.concatenate(waves, axis=1), vocode(*odd.model, codes))


def test_sound_depends_on_no_later_frame(odd: Case) -> None:
    codes = odd.codes(40, seed=5)
    other = codes.copy()
    other[:, :, 20:] = odd.codes(20, seed=6)
    (one,), (two,) = vocode(*odd.model, codes), vocode(*odd.model, other)
    differs = np.flatnonzero(one != two)
    assert differs[0] == samples_of(odd.config, 20)


def test_few_programs_serve_all_lengths(load) -> None:
    tiny = load("tiny")
    before = vocode_chunk._cache_size()
    for n in (1, 2, 3, 5, 11, 19, 33, 70):
        vocode(*tiny.model, tiny.codes(n))
    assert vocode_chunk._cache_size() - before <= 2


@pytest.mark.parametrize("rows", [1, 3, 17, 300])
def test_chunks_are_bounded_and_lie_where_they_do_without_the_earlier_ones(rows: int) -> None:
    codes = np.arange(rows * 2 * 150, dtype=np.int32).reshape(rows, 2, 150)
    chunks, at = list(_chunks(codes)), 0
    for i, chunk in enumerate(chunks):
        later = list(_chunks(codes[:, :, at:], at))
        assert [one.count for one in later] == [one.count for one in chunks[i:]]
        assert chunk.codes.shape[2] == (LONG if at >= LONG_FROM and rows <= MAX_FRAMES // LONG else SHORT)
        np.testing.assert_array_equal(chunk.codes[:, :, : chunk.count], codes[:, :, at : at + chunk.count])
        at += chunk.count
    assert at == 150


def test_nothing_sounds_like_nothing(odd: Case) -> None:
    for wave in (*vocode(*odd.model, odd.codes(0, rows=2)), *vocode_like_reference(*odd.model, odd.codes(0, rows=2))):
        assert wave.shape == (0,) and wave.dtype == np.float32
    assert vocode(*odd.model, odd.codes(4, rows=0)) == []
    vocoder = Vocoder(*odd.model)
    assert vocoder.add(odd.codes(0)[0]).shape == vocoder.finish().shape == (0,)
    assert vocoder.add(odd.codes(1)[0]).shape == (samples_of(odd.config, 1),), "a first frame is heard at once"
    assert vocoder.add(odd.codes(0)[0]).shape == vocoder.finish().shape == (0,), "and never again"


def test_half_precision_sounds_alike(odd: Case) -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), odd.params)
    codes = odd.codes(16, seed=7)
    (ours,), want = vocode(params, odd.declaration, odd.config, codes), odd.theirs(codes)[0]
    assert ours.dtype == np.float32 and np.abs(ours).max() <= 1
    assert np.sqrt(np.mean((ours - want) ** 2)) < 0.1 * want.std()
    assert len(np.unique(ours)) > 0.9 * len(ours), "samples were rounded to half precision"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c, codes: codes[:, :-1], r"shape \[1, 6, 4\]; give \[B, Q, F\] with the model's Q = 7"),
        (lambda c, codes: codes[0], r"shape \[7, 4\]; give \[B, Q, F\]"),
        (lambda c, codes: codes.astype(np.float32), "type float32; give whole numbers"),
        (lambda c, codes: codes > 3, "type bool; give whole numbers"),
        (lambda c, codes: np.where(codes == codes.max(), 96, codes), "is 96, not one of the model's 0 to 95"),
        (lambda c, codes: codes - c.codebook_size, r"codes\[0, 0, 0\] is -"),
    ],
)
def test_codes_that_are_none(odd: Case, change: Callable, message: str) -> None:
    wrong = change(odd.config, odd.codes(4))
    for call in (vocode, vocode_like_reference):
        with pytest.raises(InputError, match=message):
            call(*odd.model, wrong)


def test_lengths_and_pieces_that_are_none(odd: Case) -> None:
    codes = odd.codes(4, rows=2)
    for lengths in ([4], [5, 1], [-1, 2], [1.5, 2.0]):
        with pytest.raises(InputError, match="for 2 rows of 4 frames; give a number from 0 to 4 for each"):
            vocode(*odd.model, codes, lengths)
    for piece, context in ((0, 1), (4, -1)):
        with pytest.raises(InputError, match="give at least 1 and at least 0"):
            vocode_like_reference(*odd.model, codes, piece=piece, context=context)


def test_a_stream_survives_codes_that_are_none(odd: Case) -> None:
    codes = odd.codes(20, seed=8)[0]
    vocoder = Vocoder(*odd.model)
    waves = [vocoder.add(codes[:, :4])]
    for wrong in (codes[None], codes[:3], codes + 1000, codes.astype(float)):
        with pytest.raises(InputError, match="give|codes"):
            vocoder.add(wrong)
    waves += [vocoder.add(codes[:, 4:]), vocoder.finish()]
    np.testing.assert_array_equal(np.concatenate(waves), vocode(*odd.model, codes[None])[0])
    with pytest.raises(InputError, match="B = 2 rows"):
        Vocoder(*odd.model, rows=2).add(odd.codes(4, rows=3))
    with pytest.raises(InputError, match="at least 1"):
        Vocoder(*odd.model, rows=0)


def test_the_public_model_gives_1920_samples_a_frame_and_loses_555(data_dir) -> None:
    values = json.loads((data_dir / "public_config.json").read_text())
    config = OmniConfig.from_hf(values).code2wav
    assert config is not None
    assert (config.total_upsample, config.lost_samples, config.sliding_window) == (1920, 555, 72)
    assert samples_of(config, 300) == 1920 * 300 - 555 and samples_of(config, 0) == 0
    del values["code2wav_config"]["sliding_window"]
    with pytest.raises(ConfigError, match=r"code2wav_config\.sliding_window"):
        OmniConfig.from_hf(values)
