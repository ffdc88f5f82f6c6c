"""Sizes, frames and spans of media options against what the official utilities make of the same values."""

import json

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.audio import load_audio
from omni_jax.inputs.options import Options
from omni_jax.inputs.settings import ImageSettings, VideoSettings
from omni_jax.inputs.sizes import frame_size, listed_frame_size, picture_size
from omni_jax.inputs.timeline import Timeline, choose

TABLES = ("pictures", "videos", "lists", "sounds")


@pytest.fixture(scope="module")
def golden(data_dir):
    return json.loads((data_dir / "golden_media_options.json").read_text())


@pytest.fixture(scope="module")
def public(data_dir):
    return json.loads((data_dir / "public_preprocessor_config.json").read_text())


def timeline_of(count, fps, height, width):
    """A file at a constant rate."""
    stamps = np.arange(count)
    every = np.ones(count, bool)
    return Timeline(stamps, stamps / fps, every, every, count / fps, (height, width), True)


def test_pictures(golden, public):
    settings = ImageSettings.from_hf(public)
    for row in golden["pictures"]:
        options = Options(**row["options"])
        if row["size"] is None:
            with pytest.raises(InputError, match="state a smaller 'min_pixels' too"):
                picture_size(row["shape"], settings, options)
        else:
            assert list(picture_size(row["shape"], settings, options)) == row["size"], row


def taken(row, settings):
    """What is taken of a described video, and the size of its frames."""
    options, (_, _, height, width) = Options(**row["options"]), row["video"]
    choice = choose(timeline_of(*row["video"]), settings, options, "video")
    return choice, frame_size((height, width), len(choice.times), settings, options)


def test_videos(golden, public):
    settings = VideoSettings.from_hf(public)
    for row in golden["videos"]:
        if row["size"] is None:
            with pytest.raises(InputError):
                taken(row, settings)
            continue
        (choice, size), fps = taken(row, settings), row["video"][1]
        assert (len(choice.times), list(size)) == (row["count"], row["size"]), row
        assert choice.fps == pytest.approx(row["fps"])
        if "nframes" in row["options"]:
            np.testing.assert_array_equal(np.round(choice.times * fps), row["frames"])
        else:  # a clock, which begins with the utilities' first frame
            assert round(choice.times[0] * fps) == row["frames"][0]
            np.testing.assert_allclose(np.diff(choice.times), 1 / choice.fps)


def test_lists_of_frames(golden, public):
    settings = VideoSettings.from_hf(public)
    for row in golden["lists"]:
        options = Options(**{name: value for name, value in row["options"].items() if name != "sample_fps"})
        _, height, width = row["video"]
        assert list(listed_frame_size((height, width), row["count"], settings, options)) == row["size"], row


def test_spans_of_sound(golden, tmp_path):
    import soundfile

    for row in golden["sounds"]:
        rate = row["rate"]
        samples = np.random.default_rng(0).normal(0, 0.1, round(1.3 * (rate or 16_000))).astype(np.float32)
        source, stated = samples, 16_000
        if rate is not None:
            source, stated = tmp_path / f"{rate}.wav", None
            soundfile.write(source, samples, rate, subtype="FLOAT")
        heard = load_audio(source, stated, start=row["start"], end=row["end"])
        assert heard.size == row["samples"], row


def test_the_tables_hold_what_they_should(golden):
    assert set(golden) == set(TABLES)
    assert sum(row["size"] is None for row in golden["videos"]) > 5  # refusals too
    assert sum(row["size"] is not None for row in golden["videos"]) > 60
    # The share of each frame is what bounds some of them.
    capped = [row for row in golden["videos"] if row["video"][0] == 1203 and "total_pixels" in row["options"]]
    assert capped
