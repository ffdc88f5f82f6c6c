"""Video: patches equal to transformers' processors, frames and sound on one clock, and named errors."""

import io
import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.inputs.image import load_image
from omni_jax.inputs.settings import VideoSettings
from omni_jax.inputs.video import VideoLimits, load_video, patchify_video, sample_count, video_audio
from scripts.golden.video_patches import ROW_STEP, shifted_crops
from tests.helpers.videos import HEIGHT, WIDTH, encode


@pytest.fixture(scope="module")
def public(data_dir: Path) -> dict:
    return json.loads((data_dir / "public_preprocessor_config.json").read_text())


@pytest.fixture(scope="module")
def settings(public: dict) -> VideoSettings:
    return VideoSettings.from_hf(public)


def levels_of(frames: np.ndarray) -> np.ndarray:
    return frames.mean(axis=(1, 2, 3))


@pytest.mark.parametrize("case", ["exact", "resized"])
def test_patches_equal_the_stored_ones_of_the_reference(data_dir, settings, case):
    golden = np.load(data_dir / "golden_video_patches.npz")
    count, height, width, _ = golden[f"{case}_frames"].tolist()
    frames = shifted_crops(load_image(data_dir / "china.jpg"), count, height, width)
    patches, grid, seconds = patchify_video(load_video(frames, settings, fps=2.0), settings)
    assert grid == tuple(golden[f"{case}_grid"]) and seconds == 1.0
    pixels = (patches[::ROW_STEP] * 0.5 + 0.5) * 255
    assert pixels.shape == golden[f"{case}_rows"].shape
    # torchvision and PIL may round differently when they resize; without resizing there is nothing to round.
    assert np.abs(pixels - golden[f"{case}_rows"]).max() < (1e-3 if case == "exact" else 1 + 1e-3)


@pytest.mark.parametrize("shape", [(180, 320), (40, 700), (1100, 900)])
def test_a_still_video_equals_the_reference_picture(public, settings, data_dir, shape):
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    values = {k: v for k, v in public.items() if not k.endswith(("type", "pixels"))}
    size = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}
    picture = Image.open(data_dir / "flower.jpg").resize(shape[::-1])
    expected = module.Qwen2VLImageProcessorPil(**values, size=size)(picture, return_tensors="np")
    frames = np.repeat(np.array(picture)[None], 4, axis=0)
    patches, grid, _ = patchify_video(load_video(frames, settings, fps=2.0), settings)
    assert grid == (2, *expected["image_grid_thw"][0][1:])
    np.testing.assert_array_equal(patches.reshape(2, -1, patches.shape[1])[0], expected["pixel_values"])
    np.testing.assert_array_equal(patches.reshape(2, -1, patches.shape[1])[1], expected["pixel_values"])


def test_an_array_is_taken_as_it_is_and_its_last_frame_repeated(settings):
    frames = np.random.default_rng(0).integers(0, 256, (5, 256, 512, 3), np.uint8)
    video = load_video(frames, settings, fps=4.0)
    patches, grid, seconds = patchify_video(video, settings)
    assert (video.fps, video.duration, grid, seconds) == (4.0, 1.25, (3, 16, 32), 0.5)  # the reference's 2 / fps
    pairs = patches.reshape(3, 512, 3, 2, 16, 16)
    np.testing.assert_array_equal(pairs[2, :, :, 0], pairs[2, :, :, 1])
    assert (pairs[1, :, :, 0] != pairs[1, :, :, 1]).any()
    np.testing.assert_allclose(pairs[1, 0, :, 1], frames[3, :16, :16].transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 5.0, 30.0, None])
@pytest.mark.parametrize("total, rate", [(1, 25.0), (2, 25.0), (3, 30.0), (51, 24.0), (249, 30.0), (30_000, 25.0)])
def test_sample_counts_equal_the_reference(settings, total, rate, fps):
    # Qwen2VLVideoProcessor.sample_frames, which needs torchvision to import, in its own words.
    most = min(768, total) // 2 * 2
    expected = int(min(max(total / rate * (fps or 2.0), 4), most, total)) // 2 * 2
    assert sample_count(total, total / rate, settings, fps or 2.0) == max(expected, min(total, 2))


def test_a_frame_is_not_lost_to_rounded_stamps(settings):
    """3.999 s at 2 frames a second are 8 frames, not 6 and one that is left over."""
    assert sample_count(100, 3.999, settings, 2.0) == 8


def test_frames_at_a_constant_rate_are_those_of_the_reference(tmp_path, settings):
    levels = [10 + 4 * i for i in range(53)]
    data = encode(tmp_path / "a.mp4", levels)
    video = load_video(data, settings, fps=3.0)
    wanted = np.arange(0, 53, 53 / 6).astype(int)  # int(53 / 25 s x 3) = 6 frames, evenly from the start
    np.testing.assert_allclose(levels_of(video.frames), np.array(levels)[wanted], atol=2)
    assert video.duration == pytest.approx(53 / 25) and video.fps == pytest.approx(6 * 25 / 53)


@pytest.mark.parametrize("kind", ["mkv", "mp4", "avi"])
def test_every_container_gives_the_same_frames(tmp_path, settings, kind):
    levels = [20 + 8 * i for i in range(25)]
    video = load_video(encode(tmp_path / f"a.{kind}", levels), settings, fps=4.0)
    np.testing.assert_allclose(levels_of(video.frames), np.array(levels)[[0, 6, 12, 18]], atol=3)
    assert video.duration == pytest.approx(1.0, abs=2e-3)


def test_a_variable_rate_is_sampled_by_the_clock(tmp_path, settings):
    times = [0, 40, 80, 120, 1000, 1800, 1840, 3000]  # half of the frames in the first eighth of a second
    levels = [20 + 25 * i for i in range(8)]
    video = load_video(encode(tmp_path / "a.mkv", levels, times), settings, fps=2.0)
    at = np.arange(len(video.frames)) * video.duration / len(video.frames)
    shown = [max(i for i, t in enumerate(times) if t / 1000 <= second + 1e-3) for second in at]
    assert len(video.frames) == 6 and shown[1] == 3  # by frame number it would be the second frame
    np.testing.assert_allclose(levels_of(video.frames), np.array(levels)[shown], atol=2)


def test_a_clock_that_starts_late_changes_nothing(tmp_path, settings):
    levels = [20 + 8 * i for i in range(25)]
    early = load_video(encode(tmp_path / "a.mkv", levels), settings)
    late = load_video(encode(tmp_path / "b.mkv", levels, times=list(range(5000, 6000, 40))), settings)
    np.testing.assert_array_equal(late.frames, early.frames)
    assert (late.duration, late.fps) == (early.duration, early.fps)


@pytest.mark.parametrize("count, taken", [(1, 1), (2, 2), (3, 2), (4, 4)])
def test_a_few_frames_are_enough(tmp_path, settings, count, taken):
    video = load_video(encode(tmp_path / "a.mp4", [30, 90, 150, 210][:count]), settings)
    assert len(video.frames) == taken
    assert patchify_video(video, settings)[1][0] == max(taken // 2, 1)


def test_real_files(data_dir, settings):
    for name, frames, duration in (
        ("hello_320x180_aac.mp4", 16, 8.3),
        ("hello_silent.mp4", 16, 8.3),
        ("hello_with_speech.mp4", 14, 7.0333),
        ("phone_vfr_480.mp4", 4, 1.5328),
    ):
        path = data_dir / name
        video = load_video(path, settings)
        patches, grid, seconds = patchify_video(video, settings)
        assert video.frames.shape == (frames, 288, 512, 3) and video.frames.dtype == np.uint8
        assert grid == (frames // 2, 18, 32) and patches.shape == (frames // 2 * 18 * 32, 1536)
        assert video.duration == pytest.approx(duration, abs=1e-3)
        # The grid steps span the video; the reference would say 2.0 seconds each.
        assert seconds * grid[0] == pytest.approx(duration, abs=1e-3)
        same = load_video(path.read_bytes(), settings)
        np.testing.assert_array_equal(same.frames, video.frames)


def test_the_fps_of_a_file_is_a_wish(data_dir, settings):
    video = load_video(data_dir / "hello_with_speech.mp4", settings, fps=1.0)
    assert len(video.frames) == 6 and video.fps == pytest.approx(6 / 7.0333, abs=1e-4)


@pytest.mark.parametrize("rotation, matrix", [(1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (3, (0, -1, 1, 0))])
def test_the_rotation_noted_in_the_file_is_applied(tmp_path, settings, rotation, matrix):
    data = bytearray(encode(tmp_path / "a.mp4", [50] * 4))
    plain = load_video(bytes(data), settings).frames
    at = data.index(b"tkhd") + 44  # a 3 x 3 matrix of 16.16 fixed point
    for i, value in zip((0, 1, 3, 4), matrix, strict=True):
        data[at + 4 * i : at + 4 * i + 4] = (value << 16).to_bytes(4, "big", signed=True)
    turned = load_video(bytes(data), settings).frames
    assert turned.shape == (plain.shape if rotation == 2 else (plain.shape[0], *plain.shape[2:0:-1], 3))


def test_the_direction_of_rotation(tmp_path, settings):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[:, WIDTH // 2 :] = 255  # the right half is white
        for _ in range(4):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    for i, value in ((0, 0), (1, 1 << 16), (3, -1 << 16), (4, 0)):  # (x, y) goes to (-y, x): a quarter turn clockwise
        data[at + 4 * i : at + 4 * i + 4] = value.to_bytes(4, "big", signed=True)
    frame = load_video(bytes(data), settings).frames[0]
    assert frame[: len(frame) // 3].mean() < 10 and frame[-len(frame) // 3 :].mean() > 245  # right has become bottom


def test_sound_of_a_video(data_dir):
    samples = video_audio(data_dir / "hello_with_speech.mp4")
    assert samples is not None and samples.dtype == np.float32
    assert samples.size / 16_000 == pytest.approx(5.41, abs=0.05)
    assert video_audio(data_dir / "hello_silent.mp4") is None


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_sound_keeps_to_the_clock_of_the_pictures(tmp_path, start):
    wave = np.sin(np.arange(16_000) / 5).astype(np.float32) / 2
    samples = video_audio(encode(tmp_path / "a.mkv", [90] * 50, sound=(wave, start)))
    lead = round(start * 16_000)
    assert samples is not None and samples.size == 16_000 + lead
    assert not samples[:lead].any()
    np.testing.assert_allclose(samples[lead:], wave, atol=1e-4)


def test_sound_before_the_pictures_is_cut(tmp_path):
    wave = np.linspace(-0.9, 0.9, 16_000).astype(np.float32)
    data = encode(tmp_path / "a.mkv", [90] * 25, times=list(range(500, 1500, 40)), sound=(wave, 0.0))
    samples = video_audio(data)
    assert samples is not None
    np.testing.assert_allclose(samples, wave[8000:], atol=1e-4)


def test_a_sound_track_of_an_instant_is_none(tmp_path):
    assert video_audio(encode(tmp_path / "a.mkv", [90] * 25, sound=(np.zeros(100), 0.0))) is None


def spoilt(data: bytes) -> bytes:
    start = data.index(b"mdat") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    return data[:start] + np.random.default_rng(0).bytes(length) + data[start + length :]


@pytest.mark.parametrize(
    "source, message",
    [
        ("https://example.com/a.mp4", "is a URL"),
        ("concat:a.mp4|b.mp4", "is a URL"),
        ("no/such/clip.mp4", "no such file"),
        (Path(__file__).parent, "not a regular file"),
        (b"", "is empty"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://example.com/a.ts\n", "playlist"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "playlist"),
        (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"/>', "playlist"),
        (b"this is not a video at all" * 40, "not a media file"),
        (None, "pass a path"),
        (7, "pass a path"),
        ([], "without frames"),
        (["no/such/frame.png"], "no such file"),
        ([np.zeros((64, 64, 3), np.uint8), np.zeros((64, 128, 3), np.uint8)], "frames of one size"),
        ("flite_slt_fox.flac", "no moving pictures"),
        ("china.jpg", "not a media file"),
    ],
)
def test_bad_files_have_named_errors(data_dir, settings, source, message):
    if isinstance(source, str) and (data_dir / source).exists():
        source = data_dir / source
    with pytest.raises(InputError, match=message):
        load_video(source, settings)


def test_damaged_files_are_refused(data_dir, settings, tmp_path):
    data = (data_dir / "hello_320x180_aac.mp4").read_bytes()
    with pytest.raises(InputError, match="damaged"):
        load_video(spoilt(data), settings)
    with pytest.raises(InputError, match="damaged, or not a media file"):
        load_video(data[: len(data) // 2], settings)  # without its index
    for kind, options in (("mp4", {"movflags": "faststart"}), ("mkv", {})):
        whole = encode(tmp_path / f"a.{kind}", [(37 * i) % 256 for i in range(200)], options=options)
        assert len(load_video(whole, settings).frames) == 16
        for part in (whole[: len(whole) // 2], whole[: len(whole) * 7 // 10]):
            with pytest.raises(InputError, match="cut short"):
                load_video(part, settings)


def test_a_cut_sound_track_is_refused(tmp_path):
    wave = np.random.default_rng(0).normal(0, 0.1, 3 * 16_000).astype(np.float32)
    data = encode(tmp_path / "a.mkv", [90] * 75, sound=(wave, 0.0))
    with pytest.raises(InputError, match="cut short|damaged"):
        video_audio(data[: len(data) // 2])


def test_no_frames_and_absurd_clocks_are_refused(tmp_path, settings):
    fragments = encode(tmp_path / "a.mp4", [9] * 10, options={"movflags": "empty_moov+frag_keyframe"})
    with pytest.raises(InputError, match="no frames"):
        load_video(fragments[: fragments.index(b"moof") - 4], settings)  # nothing but the header
    assert len(load_video(fragments, settings).frames) == 4
    with pytest.raises(InputError, match="time stamps"):
        load_video(encode(tmp_path / "b.mkv", [9] * 4, times=[0, 1, 2, 3_600_000]), settings)
    with pytest.raises(InputError, match="no frames, or none with a time stamp"):
        load_video(encode(tmp_path / "c.h264", [9] * 10, codec="libx264"), settings)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf"), 1e6, "2"])
def test_absurd_rates_are_refused(data_dir, settings, fps):
    for source in (data_dir / "hello_silent.mp4", np.zeros((2, 64, 64, 3), np.uint8)):
        with pytest.raises(InputError, match="fps"):
            load_video(source, settings, fps=fps)


@pytest.mark.parametrize(
    "array, fps, message",
    [
        (np.zeros((2, 64, 64, 3), np.uint8), None, "without fps"),
        (np.zeros((2, 64, 64, 3), np.float32), 2.0, "pass uint8"),
        (np.zeros((64, 64, 3), np.uint8), 2.0, "pass uint8"),
        (np.zeros((2, 3, 64, 64), np.uint8), 2.0, "pass uint8"),
        (np.zeros((0, 64, 64, 3), np.uint8), 2.0, "pass uint8"),
        (np.zeros((769, 4, 4, 3), np.uint8), 2.0, "769 frames"),
        (np.broadcast_to(np.uint8(0), (2, 9000, 9000, 3)), 2.0, "make it smaller"),
    ],
)
def test_bad_arrays_have_named_errors(settings, array, fps, message):
    with pytest.raises(InputError, match=message):
        load_video(array, settings, fps=fps)


def test_a_strip_is_refused(settings):
    with pytest.raises(InputError, match="200 times"):
        patchify_video(load_video(np.zeros((2, 4, 900, 3), np.uint8), settings, fps=2.0), settings)


@pytest.mark.parametrize(
    "limits, message",
    [
        (VideoLimits(seconds=1.0), "longer than 1 s"),
        (VideoLimits(wall_seconds=0.0), "takes too long"),
        (VideoLimits(frame_pixels=1000), "frames of"),
    ],
)
def test_limits_can_be_set(data_dir, settings, limits, message):
    with pytest.raises(InputError, match=message):
        load_video(data_dir / "hello_silent.mp4", settings, limits=limits)


def test_an_array_needs_no_decoder(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    frames = np.zeros((2, 256, 512, 3), np.uint8)
    assert patchify_video(load_video(frames, settings, fps=2.0), settings)[1] == (1, 16, 32)


def test_bytes_are_not_consumed(data_dir, settings):
    data = bytearray((data_dir / "hello_silent.mp4").read_bytes())
    assert len(load_video(data, settings).frames) == len(load_video(memoryview(data), settings).frames)
    assert io.BytesIO(data).read() == (data_dir / "hello_silent.mp4").read_bytes()
