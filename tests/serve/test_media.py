"""Media of requests: bytes or base64 afterwards, and no path or URL, whatever a part holds."""

import asyncio
import base64
import os

import pytest

from omni_jax.errors import InputError
from omni_jax.inputs.messages import read_conversation
from omni_jax.serve.errors import RequestError
from omni_jax.serve.fetch import Reach
from omni_jax.serve.media import Media, Policy

DATA = b"some bytes of a picture"
TEXT = base64.b64encode(DATA).decode()
URL = f"data:image/png;base64,{TEXT}"


def _resolve(part, policy=Policy()):  # noqa: B008
    (message,) = asyncio.run(Media(policy).resolve([{"role": "user", "content": [part]}]))
    return message["content"][0]


def _source(part, policy=Policy()):  # noqa: B008
    """What `inputs.messages` finds in a part."""
    (found,) = read_conversation([{"role": "user", "content": [_resolve(part, policy)]}]).media
    return found


@pytest.mark.parametrize(
    "part, kind",
    [
        ({"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, "image"),
        ({"type": "image_url", "image_url": URL}, "image"),
        ({"type": "image", "image": URL}, "image"),
        ({"type": "image", "url": URL, "path": None}, "image"),
        ({"type": "image", "base64": TEXT}, "image"),
        ({"type": "audio_url", "audio_url": {"url": URL}}, "audio"),
        ({"type": "audio", "audio": URL}, "audio"),
        ({"type": "input_audio", "input_audio": {"data": TEXT, "format": "wav"}}, "audio"),
        ({"type": "input_audio", "input_audio": {"data": URL, "format": "mp3"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": URL}}, "video"),
        ({"type": "video", "video": URL}, "video"),
        ({"type": "audio", "audio": DATA}, "audio"),
    ],
)
def test_all_shapes_of_media(part, kind):
    found = _source(part)
    assert found.kind == kind and found.source == DATA


def test_frames_and_options():
    found = _source({"type": "video", "video": [URL, {"url": URL}], "sample_fps": 2})
    assert found.source == [DATA, DATA] and found.rate == 2
    found = _source({"type": "image_url", "image_url": {"url": URL}, "max_pixels": 4096})
    assert found.options.max_pixels == 4096
    found = _source({"type": "video_url", "video_url": {"url": URL}, "fps": 1, "use_audio_in_video": True})
    assert found.options.fps == 1 and found.options.use_audio_in_video


@pytest.mark.parametrize("source", ["/etc/passwd", "passwd", "file:///etc/passwd", "FILE:/etc/passwd", "~/x",
                                    "http://127.0.0.1/", "https://example.com/a.png", "ftp://a/b", "pipe:0",
                                    "concat:a|b", "", " data:x"])  # fmt: skip
@pytest.mark.parametrize(
    "shape",
    [
        lambda s: {"type": "image_url", "image_url": {"url": s}},
        lambda s: {"type": "image_url", "image_url": s},
        lambda s: {"type": "image", "image": s},
        lambda s: {"type": "image", "path": s},
        lambda s: {"type": "image", "image": {"url": s}},
        lambda s: {"type": "audio", "url": s},
        lambda s: {"type": "audio_url", "audio_url": {"url": s}},
        lambda s: {"type": "video", "video": [s]},
        lambda s: {"type": "video", "video": [URL, {"url": s}]},
    ],
)
def test_nothing_local_or_remote_by_default(source, shape):
    with pytest.raises(RequestError) as caught:
        _resolve(shape(source))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {"data": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "http://127.0.0.1/"}},
        {"type": "input_audio", "input_audio": "/etc/passwd"},
        {"type": "input_audio"},
        {"type": "input_audio", "input_audio": {"data": TEXT, "format": "pcm16"}},
        {"type": "image", "image": {"path": "/etc/passwd"}},
        {"type": "image", "image": {"bytes": "x", "path": "/etc/passwd"}},
        {"type": "audio", "audio": {"path": "/etc/passwd", "array": [0.0]}},
        {"type": "image", "base64": "file:///etc/passwd"},
        {"type": "image", "image": URL, "path": "/etc/passwd"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"path": "/etc/passwd"}},
        {"type": "image_url"},
        {"type": "image", "image": ["/etc/passwd"]},
        {"type": "video", "video": [["/etc/passwd"]]},
        {"type": "audio", "audio": [0.1, 0.2], "sampling_rate": 16000},
        {"type": "audio", "audio": 3},
    ],
)
def test_shapes_that_would_name_something_else(part):
    with pytest.raises(RequestError) as caught:
        _resolve(part)
    assert caught.value.status == 400 and "/etc" not in str(_safe(part))


def _safe(part):
    """What would reach `inputs.messages`, nothing where it is refused."""
    try:
        return _resolve(part)
    except RequestError:
        return ""


def test_what_is_no_medium_is_left_for_the_reader_of_messages():
    messages = [
        "x",
        {"role": "user", "content": "hi"},
        {"role": "user", "content": ["x", {"type": "text", "text": "a"}]},
    ]
    assert asyncio.run(Media(Policy()).resolve(messages)) == messages
    part = {"type": "picture", "path": "/etc/passwd"}
    with pytest.raises(InputError):
        read_conversation([{"role": "user", "content": [_resolve(part)]}])


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "media"
    (inside / "deep").mkdir(parents=True)
    (inside / "a b.png").write_bytes(DATA)
    (inside / "deep" / "c.png").write_bytes(DATA)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "d").write_bytes(b"secret")
    (inside / "out").symlink_to(tmp_path / "secret")
    (inside / "outside").symlink_to(tmp_path)
    (inside / "within").symlink_to(inside / "deep" / "c.png")
    os.mkfifo(inside / "pipe")
    return inside


@pytest.mark.parametrize(
    "name", ["a b.png", "deep/c.png", "deep/../a b.png", "within", "{}/a b.png", "file://{}/a%20b.png"]
)
def test_files_of_the_folder_are_read(folder, name):
    assert _source({"type": "image", "image": name.format(folder)}, Policy(folder)).source == DATA


@pytest.mark.parametrize(
    "name",
    [
        "../secret", "deep/../../secret", "out", "outside/secret", "{}/../secret", "/etc/passwd", "file:///etc/passwd",
        "file://{}/../secret", "file://{}/%2e%2e/secret", "file://{}/..%2fsecret", "../media2/d", "missing", "deep",
        "pipe", ".", "a\0b", "file://{}/a%00b", "file://evil.org{}/a%20b.png", "/proc/self/environ",
    ],
)  # fmt: skip
def test_nothing_outside_of_the_folder_is_read(folder, name):
    with pytest.raises(RequestError) as caught:
        _resolve({"type": "image", "image": name.format(folder)}, Policy(folder))
    assert caught.value.status == 400 and "secret" not in caught.value.message.replace(name, "")


def test_limits_of_one_request(folder):
    part = {"type": "image", "image": "a b.png"}
    video = {"type": "video", "video": ["a b.png", "within"]}
    assert _source(part, Policy(folder, most_bytes=len(DATA))).source == DATA
    assert len(_source(video, Policy(folder, most_bytes=2 * len(DATA), most_media=2)).source) == 2
    for policy, given in (
        (Policy(folder, most_bytes=len(DATA) - 1), part),
        (Policy(folder, most_bytes=2 * len(DATA) - 1), video),
        (Policy(folder, most_media=1), video),
        (Policy(most_media=1), {"type": "video", "video": [URL, URL]}),
    ):
        with pytest.raises(RequestError) as caught:
            _resolve(given, policy)
        assert caught.value.status == 413


def test_urls_are_fetched_from_allowed_hosts_only(monkeypatch):
    asked = []
    monkeypatch.setattr("omni_jax.serve.media.fetch", lambda url, most, reach: asked.append((url, most)) or DATA)
    policy = Policy(reach=Reach(("example.com",)), most_bytes=1000)
    assert _source({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, policy).source == DATA
    assert asked == [("https://example.com/a.png", 1000)]


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError):
        Media(Policy(tmp_path / "missing"))
