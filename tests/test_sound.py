"""Speech files: complete or absent, and only of the kinds that are offered."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from omni_jax.errors import InputError
from omni_jax.sound import write_sound


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

    def fail(path: Path, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(soundfile, "write", fail)
    with pytest.raises(InputError, match="disk full"):
        write_sound(tmp_path / "a.wav", np.zeros(9, np.float32), 24_000)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("samples", [None, np.zeros((1, 9), np.float32), np.zeros(9, np.int64)])
def test_what_is_no_sound_is_refused(samples: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="speech=True"):
        write_sound(tmp_path / "a.flac", samples)  # type: ignore[arg-type]


@pytest.mark.parametrize("name, message", [("a.mp3", "wav"), ("b", "wav"), ("no/a.wav", "folder")])
def test_other_places_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_sound(tmp_path / name, np.zeros(9, np.float32), 24_000)
