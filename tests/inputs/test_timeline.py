"""Decoding only what is needed gives the frames that decoding everything gives, whatever the codec and container."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.inputs import timeline as module
from omni_jax.inputs.options import UNSTATED, Options
from omni_jax.inputs.settings import VideoSettings
from omni_jax.inputs.source import open_container
from omni_jax.inputs.timeline import Bounds, Timeline, choose, decode_all, decode_at, needed_packets, read_timeline
from omni_jax.inputs.video import load_video

WIDTH, HEIGHT, FRAMES = 64, 48, 72
# Codecs and their options, by the name of a file.
STREAMS = {
    "closed.mp4": ("libx264", {"g": "15", "bf": "3", "flags": "+cgop"}),
    "one_key.mp4": ("libx264", {"g": "300", "bf": "2", "b-pyramid": "normal"}),
    "open.mkv": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}),
    "refresh.mp4": ("libx264", {"g": "20", "bf": "0", "intra-refresh": "1"}),
    "fields.ts": ("libx264", {"g": "15", "bf": "2", "flags": "+ildct"}),
    "hevc_open.mp4": ("libx265", {"x265-params": "keyint=10:min-keyint=10:open-gop=1:bframes=3:log-level=none"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg2.ts": ("mpeg2video", {"g": "9", "bf": "2"}),
    "mpeg4.avi": ("mpeg4", {"g": "10", "bf": "2"}),
    "mpeg4.mp4": ("mpeg4", {"g": "10", "bf": "2"}),
    "vp8.webm": ("libvpx", {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "realtime"}),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "lag-in-frames": "10", "deadline": "realtime", "cpu-used": "8"}),
    "intra.mov": ("mjpeg", {}),
    "fragments.mp4": ("libx264", {"g": "10", "bf": "2"}),
}
IRREGULAR = np.cumsum(np.random.default_rng(3).integers(5, 90, FRAMES)).tolist()


@pytest.fixture(scope="module")
def settings(data_dir):
    import json

    return VideoSettings.from_hf(json.loads((data_dir / "public_preprocessor_config.json").read_text()))


def film(path: Path, codec: str, options: dict[str, str], times: list[int]) -> Path:
    """A bright spot that moves over a noisy ground, its frames shown at `times` in milliseconds."""
    ground = np.random.default_rng(0).integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8)
    fragments = {"movflags": "frag_keyframe+empty_moov"} if path.name == "fragments.mp4" else {}
    with av.open(str(path), "w", options=fragments) as out:
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25 if codec.startswith("mpeg") else 1000)
        for number, at in enumerate(times):
            pixels = ground.copy()
            pixels[4 + number % 30 : 14 + number % 30, number % 50 : 12 + number % 50] = 150 + number
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = at // (40 if codec.startswith("mpeg") else 1), stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def both_ways(path: Path, settings: VideoSettings, options: Options) -> tuple[dict, dict, Timeline, int]:
    """Frames by number, decoded where needed and all, and how many the decoder was given."""
    bounds = Bounds("video")
    with open_container(path, "video") as container:
        timeline = read_timeline(container, bounds)
    choice = choose(timeline, settings, options, "video")
    ways = []
    for decode in (decode_at, decode_all):
        with open_container(path, "video") as container:
            ways.append({n: f.to_ndarray(format="rgb24") for n, f in decode(container, timeline, choice, bounds)})
    wanted = module._on_display(timeline, choice.times)
    return ways[0], ways[1], timeline, int(needed_packets(timeline, wanted)[0].sum())


@pytest.mark.parametrize("name", STREAMS)
def test_frames_are_those_of_decoding_everything(tmp_path, settings, name):
    codec, encoding = STREAMS[name]
    path = film(tmp_path / name, codec, encoding, list(range(0, 40 * FRAMES, 40)))
    for options in (Options(fps=2.0), Options(nframes=6), Options(video_start=1.3, fps=4.0)):
        some, all_, timeline, needed = both_ways(path, settings, options)
        assert sorted(all_) == list(range(len(all_))) and set(some) <= set(all_)
        for number in some:
            np.testing.assert_array_equal(some[number], all_[number], err_msg=f"frame {number}")
        if name not in ("refresh.mp4", "fields.ts", "vp8.webm", "mpeg4.avi"):  # which may be left to decoding all
            assert timeline.is_exact and set(some) == set(all_)
        if name in ("closed.mp4", "open.mkv", "hevc_open.mp4", "mpeg2.ts", "intra.mov", "fragments.mp4"):
            assert needed < FRAMES * 0.8


@pytest.mark.parametrize("name", ["closed.mp4", "open.mkv", "hevc_open.mp4"])
def test_irregular_clocks(tmp_path, settings, name):
    path = film(tmp_path / name, *STREAMS[name], IRREGULAR)
    for options in (Options(fps=3.0), Options(nframes=10), Options(video_start=0.7, video_end=2.9)):
        some, all_, _, _ = both_ways(path, settings, options)
        assert sorted(some) == sorted(all_)
        assert all(np.array_equal(some[number], all_[number]) for number in all_)


def test_what_does_not_come_out_is_decoded_with_all(tmp_path, settings, monkeypatch):
    path = film(tmp_path / "a.mp4", *STREAMS["closed.mp4"], list(range(0, 40 * FRAMES, 40)))
    expected = load_video(path, settings, 2.0).frames
    monkeypatch.setattr("omni_jax.inputs.video.decode_at", lambda *_: iter(()))
    np.testing.assert_array_equal(load_video(path, settings, 2.0).frames, expected)


def test_a_key_frame_suffices_for_itself(tmp_path, settings):
    """Groups of fifteen frames: of a frame each 0.6 s only the key frames are decoded."""
    rigid = {"bf": "3", "x264-params": "keyint=15:min-keyint=15:scenecut=0"}
    path = film(tmp_path / "a.mp4", "libx264", rigid, list(range(0, 2400, 40)))
    some, all_, _, needed = both_ways(path, settings, Options(fps=1 / 0.6))
    assert len(some) == len(all_) == needed == 4


def described(stamps, keys):
    """A timeline in order of decoding, of stamps and the places of key frames."""
    stamps = np.array(stamps)
    is_key = np.isin(np.arange(len(stamps)), keys)
    return Timeline(stamps, stamps / 25, is_key, np.ones(len(stamps), bool), len(stamps) / 25, (48, 64), True)


@pytest.mark.parametrize(
    "wanted, needed, begins",
    [
        ([0], [0], []),
        ([2], [0, 1, 2], []),
        ([5], [5], [5]),
        ([6], [0, 1, 2, 3, 4, 5, 6], []),  # shown before its key frame: builds on what was before
        ([8], [5, 8], [5]),  # without the two that are shown before the key frame
        ([0, 8], [0, 5, 8], [5]),
        ([4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8], []),
    ],
)
def test_what_is_needed(wanted, needed, begins):
    #                     I  P  B  B  P  I  B  B  P
    timeline = described([0, 3, 1, 2, 4, 7, 5, 6, 8], [0, 5])
    found, starts = needed_packets(timeline, np.array(wanted))
    assert np.flatnonzero(found).tolist() == needed and np.flatnonzero(starts).tolist() == begins


def test_spans(tmp_path, settings):
    timeline = described(range(100), [0])  # four seconds
    whole, cut = (
        choose(timeline, settings, UNSTATED, "video"),
        choose(timeline, settings, Options(video_start=1.0, video_end=1.96, fps=5.0), "video"),
    )
    assert whole.duration == 4.0 and cut.duration == pytest.approx(1.0)  # 25 frames, the last shown for its time too
    np.testing.assert_allclose(cut.times, [1.0, 1.25, 1.5, 1.75])
    assert choose(timeline, settings, Options(video_end=99.0), "video").duration == 4.0
    for options, words in (
        (Options(video_start=4.5), "no frame from 4.5 s to its end; its frames are shown from 0 to 3.96 s"),
        (Options(video_start=0.01, video_end=0.02), "no frame from 0.01 s to 0.02 s"),
        (Options(nframes=102), "'nframes' is 102"),
        (Options(nframes=1), "'nframes' is 1, taken as 0"),
    ):
        with pytest.raises(InputError, match=words):
            choose(timeline, settings, options, "video")
