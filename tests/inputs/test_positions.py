"""Rotary positions against transformers' get_rope_index: equal to the last bit, fractional positions included."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.inputs.audio import token_count
from omni_jax.inputs.positions import MediaItem, rope_positions
from omni_jax.reader import Reader
from scripts.small.configs import config_dict
from tests.inputs.rope_reference import rope_index

VARIANTS = ("tiny", "small", "odd")  # 13, 25 and 10 positions a second; merges of 2, 3 and 4; chunks of 100, 102 and 98
CONFIGS = {variant: config_dict(variant)["thinker_config"] for variant in VARIANTS}
MARKS = ("vision_start", "vision_end", "audio_start", "audio_end")


@dataclass
class Row:
    """A prompt under construction, with its media as this package and as transformers describe them."""

    variant: str

    def __post_init__(self):
        self.values = CONFIGS[self.variant]
        self.config = ThinkerConfig.from_hf(Reader(self.values, "thinker_config"))
        self.ids, self.items, self.mel_frames = [], [], []

    def mark(self, *names):
        self.ids += [self.values[f"{name}_token_id"] for name in names]

    def tokens(self, grid):
        return grid[0] * grid[1] * grid[2] // self.config.vision.spatial_merge_size**2

    def grid(self, t, h, w):
        """A grid of whole merged tokens."""
        return (t, h * self.config.vision.spatial_merge_size, w * self.config.vision.spatial_merge_size)

    def text(self, n):
        self.ids += [7] * n
        return self

    def image(self, h, w):
        grid = self.grid(1, h, w)
        self.mark("vision_start", *["image"] * self.tokens(grid), "vision_end")
        self.items.append(MediaItem("image", grid))
        return self

    def video(self, t, h, w, seconds=1.0):
        grid = self.grid(t, h, w)
        self.mark("vision_start", *["video"] * self.tokens(grid), "vision_end")
        self.items.append(MediaItem("video", grid, seconds))
        return self

    def audio(self, frames):
        n = self.sound(frames)
        self.mark("audio_start", *["audio"] * n, "audio_end")
        self.items.append(MediaItem("audio", audio_tokens=n))
        return self

    def sound(self, frames):
        self.mel_frames.append(frames)
        return token_count(frames, self.config.audio.chunk_frames)

    def video_with_sound(self, t, h, w, frames, seconds=1.0):
        grid, n = self.grid(t, h, w), self.sound(frames)
        self.mark("vision_start", "audio_start", *merged(t, h * w, n, seconds, self), "audio_end", "vision_end")
        self.items.append(MediaItem("video", grid, seconds, n))
        return self

    def ours(self):
        return rope_positions(np.array(self.ids, np.int32), self.items, self.config)


def merged(t, per_frame, sounds, seconds, row):
    """The order of tokens in a video with sound, as the processor of transformers writes it: float64, from 0 on."""
    times = np.repeat(np.arange(t) * seconds * float(row.config.position_id_per_seconds), per_frame)
    order, video, audio = [], 0, 0
    while video < len(times) and audio < sounds:
        if times[video] <= audio:
            order, video = order + ["video"], video + 1
        else:
            order, audio = order + ["audio"], audio + 1
    return order + ["video"] * (len(times) - video) + ["audio"] * (sounds - audio)


def theirs(rows, use_audio_in_video=False, left=True):
    """Positions [3, T] and deltas of the rows by transformers, in one padded call."""
    width = max(len(row.ids) for row in rows)
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    spans = [slice(width - len(row.ids), width) if left else slice(0, len(row.ids)) for row in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[i, span], mask[i, span] = row.ids, 1
    items = [item for row in rows for item in row.items]
    positions, deltas = rope_index(
        rows[0].values,
        ids,
        mask,
        images=[item.grid for item in items if item.kind == "image"] or None,
        videos=[item.grid for item in items if item.kind == "video"] or None,
        seconds_per_grid=[item.seconds_per_grid for item in items if item.kind == "video"] or None,
        mel_frames=[n for row in rows for n in row.mel_frames] or None,
        use_audio_in_video=use_audio_in_video,
    )
    return [(positions[:, i, s], float(deltas[i])) for i, s in enumerate(spans)]


def assert_equal(rows, **switches):
    for row, (positions, delta) in zip(rows, theirs(rows, **switches), strict=True):
        ours, our_delta = row.ours()
        assert ours.dtype == np.float32 and ours.shape == (3, len(row.ids))
        np.testing.assert_array_equal(ours, positions)
        assert our_delta == delta


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_counts(variant):
    row = Row(variant).text(11)
    positions, delta = row.ours()
    np.testing.assert_array_equal(positions, np.tile(np.arange(11), (3, 1)))
    assert delta == 0
    assert_equal([row])


def test_an_empty_row():
    positions, delta = Row("tiny").ours()
    assert positions.shape == (3, 0) and delta == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_sound_counts_like_text_on_all_three_axes(variant):
    """Defect elsewhere: height and width frozen for audio."""
    row = Row(variant).text(3).audio(731).text(2).audio(60).text(1)
    positions, delta = row.ours()
    np.testing.assert_array_equal(positions, np.tile(np.arange(len(row.ids)), (3, 1)))
    assert delta == 0
    assert_equal([row])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "build",
    [
        lambda r: r.text(4).image(3, 5).text(6),
        lambda r: r.text(4).image(3, 5).text(2).image(6, 2).text(6),  # two images; a defect elsewhere
        lambda r: r.image(2, 2).image(3, 3),  # nothing between the marks
        lambda r: r.text(2).image(7, 2).text(3).video(4, 2, 3, 1.0).text(5),  # image + video; a defect elsewhere
        lambda r: r.text(2).video(5, 2, 3, 2 / 1.99).text(9),  # a video without sound keeps three axes
        lambda r: r.text(2).video(3, 2, 2, 0.3).text(1).video(2, 4, 1, 2.0),
        lambda r: r.audio(150).text(3).image(2, 3).audio(990).video(3, 1, 2, 0.7).text(2),
        lambda r: r.text(1).video(1, 1, 1, 1.0),
    ],
    ids=["image", "two images", "adjacent", "image+video", "video", "two videos", "all three", "smallest"],
)
def test_media_without_sound_in_video(variant, build):
    assert_equal([build(Row(variant))])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "build",
    [
        lambda r: r.text(4).video_with_sound(4, 2, 3, 400).text(6),
        lambda r: r.text(4).video_with_sound(4, 2, 3, 90, 2 / 1.99).text(6),  # frames go on after the sound
        lambda r: r.text(4).video_with_sound(2, 3, 2, 1500, 0.31).text(6),  # sound goes on after the frames
        lambda r: r.video_with_sound(1, 2, 60, 40).text(6),  # a frame wider than its sound: positions overlap
        lambda r: r.text(2).video_with_sound(1, 2, 60, 40),  # ... and end the prompt: the next one is behind the widest
        lambda r: r.text(4).video_with_sound(3, 2, 2, 300).text(2).video_with_sound(2, 3, 1, 120, 0.7).text(3),
        lambda r: r.text(4).audio(250).image(3, 4).text(2).video_with_sound(3, 2, 2, 300, 1.7).audio(70).text(3),
    ],
    ids=["plain", "short sound", "long sound", "wide", "wide at the end", "two", "mixture"],
)
def test_video_with_sound(variant, build):
    """Lengths are token counts: a port that applied the length formula to them again misplaced 77 % of the tokens."""
    assert_equal([build(Row(variant))], use_audio_in_video=True)


def test_time_runs_at_the_rate_of_the_configuration():
    """Defect elsewhere: the vision encoder's tokens_per_second, or 1, in the place of position_id_per_seconds."""
    for variant, rate in (("tiny", 13), ("small", 25), ("odd", 10)):
        positions, _ = Row(variant).video(3, 1, 1, 0.5).ours()
        np.testing.assert_array_equal(positions[0, 1:4], 1 + np.array([0, 0.5 * rate, rate], np.float32))


@pytest.mark.parametrize("left", [True, False])
def test_rows_of_a_batch(left):
    """Each row alone gives what the whole padded batch gives; the delta counts from the row's own length."""
    rows = [
        Row("tiny").text(3).image(2, 3).text(40),
        Row("tiny").text(5),
        Row("tiny").audio(320).text(2).video(3, 2, 2, 0.9).text(4),
        Row("tiny").text(2).image(1, 1).text(1).image(5, 2),
    ]
    assert_equal(rows, left=left)


@pytest.mark.parametrize("seconds", np.linspace(39.0, 39.076, 12))
def test_long_text_behind_a_fraction_rounds_as_in_the_reference(seconds):
    """Marks take the position from 511.x over 512, text takes it over 1024 and 2048; each step rounds once."""
    assert_equal([Row("tiny").text(2).video(2, 1, 1, float(seconds)).text(3000).image(1, 1).text(2000)])


segments = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.integers(1, 40)),
        st.tuples(st.just("text"), st.integers(500, 3000)),  # across binades, where fractional positions round
        st.tuples(st.just("image"), st.integers(1, 6), st.integers(1, 6)),
        st.tuples(st.just("audio"), st.integers(1, 1200)),
        st.tuples(
            st.just("video"),
            st.integers(1, 6),
            st.integers(1, 4),
            st.integers(1, 4),
            st.integers(1, 700),
            st.one_of(st.floats(0.02, 4.0), st.integers(1, 16).map(lambda k: k / 8)),
        ),
    ),
    max_size=8,
)


def build(variant, parts, sound):
    row = Row(variant).text(2)  # with one token, transformers would take the padding's position for the largest
    for kind, *args in parts:
        if kind == "video":
            t, h, w, frames, seconds = args
            row.video_with_sound(t, h, w, frames, seconds) if sound else row.video(t, h, w, seconds)
        else:
            getattr(row, kind)(*args)
    return row


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(VARIANTS), st.lists(segments, min_size=1, max_size=3), st.booleans())
def test_random_mixtures(variant, rows, left):
    assert_equal([build(variant, parts, sound=False) for parts in rows], left=left)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(VARIANTS), segments)
def test_random_mixtures_with_sound_in_video(variant, parts):
    row = build(variant, parts, sound=True)
    for item in row.items:
        # Ties that rounding breaks are a case of their own, below.
        times = np.arange(item.grid[0] if item.kind == "video" else 0) * item.seconds_per_grid
        off = np.abs(times * row.config.position_id_per_seconds - np.round(times * row.config.position_id_per_seconds))
        assume(np.all((off == 0) | (off > 2e-3)))
    assert_equal([row], use_audio_in_video=True)


def test_silent_and_sounding_videos_in_one_prompt():
    """transformers loses the media behind a silent video under use_audio_in_video (VeOmni#493)."""
    row = Row("tiny").text(2).video(2, 2, 3, 0.5).text(3).video_with_sound(2, 2, 2, 150, 0.5)
    row.text(2).image(2, 2).text(1)
    positions, delta = row.ours()
    wrong, _ = theirs([row], use_audio_in_video=True)[0]
    assert not np.array_equal(positions, wrong), "transformers has mended it: compare with it instead"
    # The same prompt in parts, each of which transformers places well, one behind the other.
    parts = [
        (Row("tiny").text(2).video(2, 2, 3, 0.5).text(3), False),
        (Row("tiny").video_with_sound(2, 2, 2, 150, 0.5).text(2), True),
        (Row("tiny").image(2, 2).text(1), False),
    ]
    expected, at = [], 0.0
    for part, sound in parts:
        alone, _ = theirs([part], use_audio_in_video=sound)[0]
        expected.append(alone + at)
        at = expected[-1].max() + 1
    np.testing.assert_array_equal(positions, np.concatenate(expected, axis=1))
    assert delta == at - len(row.ids)


def test_rounding_does_not_swap_sound_and_frames():
    """Frame 49 of 7 a second starts with sound 91. The reference's float32 puts it behind, where the tokens do not."""
    row = Row("tiny").video_with_sound(50, 1, 1, 1000, 1 / 7)
    positions, _ = row.ours()
    wrong, _ = theirs([row], use_audio_in_video=True)[0]
    assert not np.array_equal(positions, wrong), "transformers has mended it: compare with it instead"
    tokens = np.array(row.ids)
    frames, sounds = (positions[0, tokens == row.values[f"{k}_token_id"]] for k in ("video", "audio"))
    np.testing.assert_allclose(frames, 2 + np.arange(50) * 13 / 7, rtol=1e-6)
    np.testing.assert_array_equal(sounds, 2 + np.arange(130))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.items.pop(), "1 runs of placeholders for 0 items"),
        (lambda r: r.items.append(MediaItem("image", (1, 2, 2))), "1 runs of placeholders for 2 items.*'image': 2"),
        (lambda r: r.items.__setitem__(0, MediaItem("image", (1, 4, 8))), "6 visual.*8 visual"),
        (lambda r: r.items.__setitem__(0, MediaItem("audio", audio_tokens=6)), "start and end marks"),
        (lambda r: r.items.__setitem__(0, MediaItem("video", (1, 4, 6))), "6 placeholders .0 visual"),
        (lambda r: r.ids.__delitem__(3), "start and end marks"),
        (lambda r: r.ids.__delitem__(slice(-3, None)), "start and end marks"),
        (lambda r: r.ids.insert(5, r.values["audio_token_id"]), "7 placeholders .6 visual, 1 audio"),
    ],
    ids=["missing", "extra", "size", "kind", "video for image", "no start", "no end", "foreign token"],
)
def test_counts_that_do_not_fit(change, message):
    row = Row("tiny").text(3).image(2, 3).text(2)
    change(row)
    with pytest.raises(InputError, match=message):
        row.ours()


def test_a_foreign_token_among_frames_and_sound():
    row = Row("tiny").text(3).video_with_sound(2, 2, 2, 60, 0.1)
    row.ids.insert(7, row.values["image_token_id"])
    with pytest.raises(InputError, match="17 placeholders .8 visual, 8 audio"):
        row.ours()
