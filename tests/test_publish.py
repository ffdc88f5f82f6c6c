"""Where a directory may be written, what is checked before the work, and what becomes of it at the end."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_jax.errors import CheckpointError
from omni_jax.manifest import MANIFEST, MARKER
from omni_jax.publish import place_of, publish


def write(
    destination: Path, text: str = "new", overwrite: bool = False, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Publish a directory of one file and one folder; `meanwhile` is called while it is incomplete."""
    with publish(destination, overwrite) as partial:
        assert not (destination / MANIFEST).exists() or overwrite
        (partial / MANIFEST).write_text(text)
        (partial / "data").mkdir()
        meanwhile()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def refuse(monkeypatch: pytest.MonkeyPatch, name: str, refused: Callable[..., bool], number: int) -> None:
    """Let `os.<name>` fail with an error number for some of its arguments."""
    real = getattr(os, name)

    def call(*args: object, **more: object) -> object:
        if refused(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **more)

    monkeypatch.setattr(os, name, call)


def test_a_new_directory_is_built_beside_its_place(tmp_path: Path) -> None:
    with publish(tmp_path / "below" / "new") as partial:
        assert partial.parent == tmp_path / "below" and not (tmp_path / "below" / "new").exists()
    assert names(tmp_path / "below") == ["new"] and names(tmp_path / "below" / "new") == []


def test_an_empty_directory_is_filled_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount point it could not be renamed over, and its parent may belong to somebody else."""
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    refuse(monkeypatch, "rename", lambda a, b: volume in (Path(a), Path(b)), errno.EBUSY)
    refuse(monkeypatch, "mkdir", lambda path, *_: Path(path).parent == tmp_path, errno.EACCES)
    write(volume)
    assert names(volume) == ["data", "lost+found", MANIFEST] and names(tmp_path) == ["volume"]


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "disk" / "here"
    target.mkdir(parents=True) if exists else None
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link")
    assert names(target) == ["data", MANIFEST] and names(tmp_path / "disk") == ["here"]
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["disk", "link"]


def test_an_interrupted_run_inside_is_cleared(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, meanwhile=interrupt)
    assert names(tmp_path) == []
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / MARKER).touch()
    (tmp_path / ".partial" / "stale").touch()
    write(tmp_path)
    assert names(tmp_path) == ["data", MANIFEST]


def test_long_names(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255))
    assert names(tmp_path) == ["n" * 255]


def test_what_is_finished_is_kept_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "rename", lambda a, b: Path(b) == tmp_path / "new", errno.EXDEV)
    with pytest.raises(
        CheckpointError, match=r"everything is written.*complete in .*\.new\.partial, move it from there"
    ):
        write(tmp_path / "new")
    assert names(tmp_path / ".new.partial") == ["data", MANIFEST]
    with pytest.raises(CheckpointError, match="not an interrupted conversion; remove or rename it"):
        write(tmp_path / "new")
    assert names(tmp_path / ".new.partial") == ["data", MANIFEST]


def test_what_was_to_be_replaced_is_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "old", "old")
    failed = []
    refuse(monkeypatch, "rename", lambda a, b: Path(a).name == ".old.partial" and not failed.append(a), errno.EIO)
    with pytest.raises(CheckpointError, match="everything is written"):
        write(tmp_path / "old", overwrite=True)
    assert failed and (tmp_path / "old" / MANIFEST).read_text() == "old"
    assert (tmp_path / ".old.partial" / MANIFEST).read_text() == "new"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def somebody() -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.txt").write_text("years of work")

    with pytest.raises(CheckpointError, match="everything is written"):
        write(tmp_path / "new", meanwhile=somebody)
    assert names(tmp_path / "new") == ["thesis.txt"] and names(tmp_path / ".new.partial") == ["data", MANIFEST]


def test_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "old", "old")
    with pytest.raises(CheckpointError, match="old exists; choose another name, or overwrite it"):
        write(tmp_path / "old")
    write(tmp_path / "old", "new", overwrite=True)
    assert (tmp_path / "old" / MANIFEST).read_text() == "new" and names(tmp_path) == ["old"]


def test_a_disk_without_locks_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unknown)
    write(tmp_path / "new")
    assert names(tmp_path) == ["new"]


def test_a_place_is_absolute_and_its_hidden_names_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of("a").final == tmp_path / "a" and place_of("a").partial == tmp_path / ".a.partial"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place_of("~/a") == place_of("a")
    assert len(place_of("b" * 255).partial.name) < 100 and place_of("b" * 255) != place_of("b" * 254)
