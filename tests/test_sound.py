"""Speech files: complete or absent, and only of the kinds that are offered."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_jax.errors import InputError
from omni_jax.sound import check_sound_file, write_sound


@pytest.mark.parametrize("name", ["a.wav", "a.WAV", "a.flac"])
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    samples = np.sin(np.arange(2400) / 9).astype(np.float32)
    write_sound(tmp_path / name, samples, 24_000)
    back, rate = soundfile.read(tmp_path / name, dtype="float32")
    assert rate == 24_000
    np.testing.assert_allclose(back, samples, atol=2**-15)


def test_no_sound_at_all_is_a_file_too(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", np.zeros(0, np.float32), 24_000)
    assert len(soundfile.read(tmp_path / "a.wav")[0]) == 0


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(b"before")
    write_bytes = Path.write_bytes

    def fail(path: Path, data: bytes) -> None:
        write_bytes(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(InputError, match="a.wav: could not be written .no space left on device.; make room"):
        write_sound(tmp_path / "a.wav", np.zeros(9, np.float32), 24_000)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("name", ["a" * 251 + ".wav", "é" * 125 + "b.wav"])
def test_the_longest_name_is_written(name: str, tmp_path: Path) -> None:
    assert len(os.fsencode(name)) == 255
    write_sound(tmp_path / name, np.zeros(9, np.float32))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_sound("~/a.wav", np.zeros(9, np.float32))
    assert (tmp_path / "a.wav").exists()


def test_a_place_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(b"before")
    assert check_sound_file(tmp_path / "a.wav") == tmp_path / "a.wav"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(InputError, match="no such file can be made .read-only file system"):
        check_sound_file(tmp_path / "a.wav")


@pytest.mark.parametrize("samples", [None, np.zeros((1, 9), np.float32), np.zeros(9, np.int64)])
def test_what_is_no_sound_is_refused(samples: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="speech=True"):
        write_sound(tmp_path / "a.flac", samples)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, message", [("a.mp3", "wav"), ("b", "wav"), ("no/a.wav", "folder"), ("a" * 252 + ".wav", "name too long")]
)
def test_other_places_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_sound(tmp_path / name, np.zeros(9, np.float32), 24_000)
