"""Packing: every valid token is indexed exactly once, finds its own values, and shapes come from a short list."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.config import AudioConfig
from omni_jax.errors import InputError
from omni_jax.inputs.audio import TOKENS_PER_CHUNK, token_count
from omni_jax.inputs.batch import Batch, bucket, coarse_bucket, pack_audio, pack_vision

BINS = 3


def audio_config(n_window: int, window_chunks: int) -> AudioConfig:
    return AudioConfig(
        num_layers=1, hidden_size=8, num_heads=1, intermediate_size=8, conv_channels=2, mel_bins=BINS,
        max_source_positions=100, n_window=n_window, n_window_infer=2 * n_window * window_chunks, out_hidden_size=8,
    )  # fmt: skip


def test_a_batch_of_text_has_neither_media_nor_padding():
    batch = Batch.of_text([[7, 8, 9], [1, 2, 3]])
    assert batch.token_ids.dtype == np.int32 and batch.token_ids.tolist() == [[7, 8, 9], [1, 2, 3]]
    assert batch.mask.all() and batch.vision == () and batch.audio is None
    assert (batch.visual_index == -1).all() and (batch.audio_index == -1).all()
    assert batch.position_ids.dtype == np.float32 and batch.position_ids.shape == (3, 2, 3)
    assert (batch.position_ids == np.arange(3)).all() and batch.rope_delta.tolist() == [0, 0]


def test_coarse_buckets_are_powers_of_two():
    assert [coarse_bucket(n) for n in (1, 31, 32, 33, 64, 65, 1000)] == [32, 32, 32, 64, 64, 128, 1024]


def test_buckets_are_powers_of_two_and_their_three_halves():
    assert [bucket(n) for n in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    assert all(n <= bucket(n) < 1.5 * n + 1 for n in range(1, 5000))
    with pytest.raises(ValueError):
        bucket(0)


@settings(max_examples=60, deadline=None)
@given(
    merge=st.integers(1, 3),
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), max_size=6),
)
def test_every_visual_token_is_indexed_once_and_finds_its_patches(merge, grids):
    items, count = [], 0
    for t, h, w in grids:
        grid = (t, h * merge, w * merge)
        n = t * h * w * merge**2
        items.append((np.arange(count + 1, count + n + 1, dtype=np.float32)[:, None] * [1, -1], grid))
        count += n
    groups, indices = pack_vision(items, merge)
    assert len(indices) == len(items)
    assert all(g.patches.dtype == np.float32 and g.grid.dtype == np.int32 for g in groups)
    # A group's merged tokens in row order, all groups one after the other: what the encoder will return.
    flat = [g.patches.reshape(-1, merge**2, 2) for g in groups]
    merged = np.concatenate(flat) if flat else np.zeros((0, merge**2, 2))
    for (patches, _), index in zip(items, indices, strict=True):
        assert index.dtype == np.int32
        np.testing.assert_array_equal(merged[index], patches.reshape(-1, merge**2, 2))
    used = np.concatenate(indices) if indices else np.zeros(0, int)
    assert len(set(used.tolist())) == len(used) == count // merge**2
    assert not np.delete(merged, used, axis=0).any()
    for group in groups:
        R, P, _ = group.patches.shape
        assert bucket(R) == R and bucket(P // merge**2) * merge**2 == P
        sizes = group.grid.prod(axis=1)
        assert (sizes <= P).all() and ((sizes == 0) == ~group.patches.any(axis=(1, 2))).all()


def test_a_video_has_one_row_per_grid_step_beside_pictures_of_its_size():
    video, picture = np.ones((3 * 16, 2), np.float32), np.full((16, 2), 2, np.float32)
    groups, (first, second) = pack_vision([(video, (3, 4, 4)), (picture, (1, 2, 8))], 2)
    assert [g.patches.shape for g in groups] == [(4, 16, 2)]
    np.testing.assert_array_equal(groups[0].grid, [[4, 4], [4, 4], [4, 4], [2, 8]])
    assert first.tolist() == list(range(12)) and second.tolist() == list(range(12, 16))


def test_many_sizes_need_few_shapes():
    items = [(np.zeros((4 * h * w, 2), np.float32), (1, 2 * h, 2 * w)) for h in range(1, 17) for w in range(1, 17)]
    groups, _ = pack_vision(items, 2)
    assert len(groups) <= 16  # of 256 sizes


@pytest.mark.parametrize("grid", [(1, 4, 6), (1, 3, 4), (2, 4, 4), (0, 4, 4)])
def test_patches_that_do_not_fit_their_grid_are_refused(grid):
    with pytest.raises(InputError, match="do not fit a grid"):
        pack_vision([(np.zeros((16, 2), np.float32), grid)], 2)


@settings(max_examples=60, deadline=None)
@given(
    n_window=st.sampled_from([49, 50, 52]),
    window_chunks=st.integers(1, 9),
    frames=st.lists(st.integers(1, 1500), max_size=4),
)
def test_every_audio_token_is_indexed_once_and_lies_in_its_window(n_window, window_chunks, frames):
    config = audio_config(n_window, window_chunks)
    F = config.chunk_frames
    mels = [np.full((BINS, n), i + 1, np.float32) + np.arange(n) / 4096 for i, n in enumerate(frames)]
    windows, indices = pack_audio(mels, config)
    if not frames:
        assert windows is None and indices == []
        return
    assert windows is not None
    W, C, M, width = windows.mel.shape
    assert (M, width) == (BINS, F) and bucket(W) == W and windows.mel.dtype == np.float32
    assert min(window_chunks, bucket(max(-(-n // F) for n in frames))) == C
    owner = np.full(W * C * TOKENS_PER_CHUNK, -1)
    for i, (mel, index) in enumerate(zip(mels, indices, strict=True)):
        assert index.dtype == np.int32 and len(index) == token_count(mel.shape[1], F)
        assert (owner[index] == -1).all()
        owner[index] = i
        first, last = index[0] // (C * TOKENS_PER_CHUNK), index[-1] // (C * TOKENS_PER_CHUNK)
        assert index[0] % (C * TOKENS_PER_CHUNK) == 0  # a clip starts a new window
        flat = windows.mel[first : last + 1].transpose(2, 0, 1, 3).reshape(BINS, -1)
        np.testing.assert_array_equal(flat[:, : mel.shape[1]], mel)
        assert not flat[:, mel.shape[1] :].any()
        valid = windows.frames[first : last + 1].reshape(-1)
        assert valid.sum() == mel.shape[1] and (valid[: mel.shape[1] // F] == F).all()
        seen = windows.width[first : last + 1].reshape(-1)
        assert (seen[valid > 0] == min(F, mel.shape[1])).all() and not seen[valid == 0].any()
    # What a chunk's valid frames become is exactly what is indexed: a prefix of every window.
    made = np.array([token_count(int(n), F) if n else 0 for n in windows.frames.reshape(-1)])
    step = np.arange(TOKENS_PER_CHUNK)
    np.testing.assert_array_equal((owner >= 0).reshape(-1, TOKENS_PER_CHUNK), step < made[:, None])
    assert (np.diff((owner >= 0).reshape(W, -1).astype(int), axis=1) <= 0).all()


def test_a_clip_is_packed_the_same_alone_and_with_others():
    config = audio_config(50, 8)
    short, long = np.ones((BINS, 37), np.float32), np.full((BINS, 950), 2, np.float32)
    alone, _ = pack_audio([short], config)
    both, _ = pack_audio([short, long], config)
    assert alone is not None and both is not None
    assert alone.width[0, 0] == both.width[0, 0] == 37
    np.testing.assert_array_equal(alone.mel[0, 0], both.mel[0, 0])
    assert both.mel.shape[:2] == (3, 8) and alone.mel.shape[:2] == (1, 1)


@pytest.mark.parametrize("shape", [(BINS + 1, 10), (BINS, 0), (10,)])
def test_a_spectrogram_of_another_shape_is_refused(shape):
    with pytest.raises(InputError, match="mel spectrogram of shape"):
        pack_audio([np.zeros(shape, np.float32)], audio_config(50, 8))
