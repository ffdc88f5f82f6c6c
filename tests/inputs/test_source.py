"""Where media come from: paths and addresses, errors and interrupts while a file is read, and the bound on its time."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from omni_jax.inputs import source as module
from omni_jax.inputs.audio import load_audio
from omni_jax.inputs.image import load_image
from omni_jax.inputs.source import MediaFile, open_source, reading, scheme_of
from omni_jax.inputs.video import video_audio


@pytest.mark.parametrize(
    "text, scheme",
    [
        ("https://a.org/b.png", "https"),
        ("HTTP:\\\\a.org", "http"),
        ("data:image/png;base64,AA==", "data"),
        ("File:/tmp/a.wav", "file"),
        ("concat:a.wav|b.wav", "concat"),
        ("s3://bucket/a.wav", "s3"),
        ("12:30.png", ""),
        ("note:12.png", ""),
        ("Screenshot 2026-11-28 at 14:08.png", ""),
        ("C:\\clip.mp4", ""),
        ("C:/clip.mp4", ""),
        ("folder/http://a", ""),
        ("", ""),
    ],
)
def test_an_address_is_more_than_a_colon(text, scheme):
    assert scheme_of(text) == scheme


def test_a_name_with_a_colon_and_a_home_directory_are_paths(tmp_path, monkeypatch):
    (tmp_path / "note:12.wav").write_bytes(b"sound")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("note:12.wav", "~/note:12.wav", Path("~") / "note:12.wav"):
        with open_source(path, "audio") as file:
            assert file.read() == b"sound"


@pytest.mark.parametrize(
    "raised",
    [
        AttributeError("no codec"),
        UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"),
        RuntimeError("decoder"),
        OSError(5),
    ],
)
def test_whatever_a_decoder_raises_is_one_sentence(raised):
    with pytest.raises(InputError, match="image 'a.png': damaged"), reading("a.png", "image", "damaged"):
        raise raised


def test_an_error_of_ours_and_an_interrupt_pass():
    for error in (InputError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, reading("a.png", "image"):
            raise error
        assert raised.value is error


class Failing(io.BytesIO):
    """A file whose second half cannot be read."""

    def __init__(self, data: bytes, error: BaseException):
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > len(self.getbuffer()) // 2:
            raise self.error
        return super().read(size)


READERS = {"debian_universal_os.flac": load_audio, "hello_with_speech.mp4": video_audio, "chelsea.png": load_image}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", READERS)
def test_errors_while_reading_are_not_lost_in_a_decoder(name, data_dir, monkeypatch, capfd):
    read: Callable = READERS[name]
    data = (data_dir / name).read_bytes()
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(module, "_open_path", lambda *_: Failing(data, failure))
    with pytest.raises(InputError, match="cannot be read .input/output error"):
        read(name)
    monkeypatch.setattr(module, "_open_path", lambda *_: Failing(data, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        read(name)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", READERS)
def test_no_file_is_decoded_for_ever(name, data_dir, monkeypatch):
    monkeypatch.setattr(module, "MAX_WALL_SECONDS", -1.0)
    with pytest.raises(InputError, match="more than -1 s; cut it into parts"):
        READERS[name](data_dir / name)


def test_positions_stay_within_the_file():
    file = MediaFile(io.BytesIO(b"0123456789"))
    assert file.seek(2**70) == 10 and file.read(5) == b""
    assert file.seek(-3, io.SEEK_END) == 7 and file.read(2**40) == b"789"
    assert file.seek(-(2**70)) == 0 and file.tell() == 0
    assert file.error is None


@pytest.mark.parametrize("start", range(11))
@pytest.mark.parametrize("count", range(1, 11))
def test_mended_bytes_read_as_others(start, count):
    file = MediaFile(io.BytesIO(b"0123456789"))
    file.mend(4, b"abc")
    file.seek(start)
    assert file.read(count) == b"0123abc789"[start : start + count]
    buffer = bytearray(count)
    file.seek(start)
    assert file.readinto(buffer) == len(b"0123abc789"[start : start + count])
