"""Where a directory may be written, what is checked before the work, and what becomes of it at the end."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_jax.errors import CheckpointError
from omni_jax.weights.contents import MANIFEST, MARKER, PARAMS
from omni_jax.weights.destination import place_of
from omni_jax.weights.manifest import write_manifest
from omni_jax.weights.publish import publish

WRITTEN = ("config.json", MANIFEST, PARAMS)


def write(
    destination: Path, text: str = "new", overwrite: bool = False, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Publish a checkpoint without arrays; `meanwhile` is called while it is incomplete."""
    with publish(destination, overwrite) as partial:
        assert not (destination / MANIFEST).exists() or overwrite
        (partial / "config.json").write_text(text)
        (partial / PARAMS).mkdir()
        write_manifest(partial, {})
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
    assert names(volume) == sorted(["lost+found", *WRITTEN]) and names(tmp_path) == ["volume"]


@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "disk" / "here"
    target.mkdir(parents=True) if exists else None
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link")
    assert names(target) == [*WRITTEN] and names(tmp_path / "disk") == ["here"]
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
    assert names(tmp_path) == [*WRITTEN]


def test_long_names(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255))
    assert names(tmp_path) == ["n" * 255]


def test_what_is_finished_is_kept_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "rename", lambda a, b: Path(b) == tmp_path / "new", errno.EXDEV)
    with pytest.raises(
        CheckpointError, match=r"everything is written.*complete in .*\.new\.partial, move it from there"
    ):
        write(tmp_path / "new")
    assert names(tmp_path / ".new.partial") == [*WRITTEN]
    with pytest.raises(CheckpointError, match="not an interrupted conversion; remove or rename it"):
        write(tmp_path / "new")
    assert names(tmp_path / ".new.partial") == [*WRITTEN]


def test_what_was_to_be_replaced_is_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "old", "old")
    failed = []
    refuse(monkeypatch, "rename", lambda a, b: Path(a).name == ".old.partial" and not failed.append(a), errno.EIO)
    with pytest.raises(CheckpointError, match="everything is written"):
        write(tmp_path / "old", overwrite=True)
    assert failed and (tmp_path / "old" / "config.json").read_text() == "old"
    assert (tmp_path / ".old.partial" / "config.json").read_text() == "new"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def somebody() -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.txt").write_text("years of work")

    with pytest.raises(CheckpointError, match="everything is written"):
        write(tmp_path / "new", meanwhile=somebody)
    assert names(tmp_path / "new") == ["thesis.txt"] and names(tmp_path / ".new.partial") == [*WRITTEN]


def test_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "old", "old")
    with pytest.raises(CheckpointError, match="old exists; choose another name, or overwrite it"):
        write(tmp_path / "old")
    write(tmp_path / "old", "new", overwrite=True)
    assert (tmp_path / "old" / "config.json").read_text() == "new" and names(tmp_path) == ["old"]


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


def test_what_other_programs_call_a_manifest_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MANIFEST).write_text('{"manifest_version": 3}')
    (tmp_path / "site" / "thesis.txt").write_text("years of work")
    for overwrite in (True, False):
        with pytest.raises(CheckpointError, match="not a complete checkpoint of omni_jax.*choose another name"):
            write(tmp_path / "site", overwrite=overwrite)
    assert names(tmp_path / "site") == [MANIFEST, "thesis.txt"] and names(tmp_path) == ["site"]


@pytest.mark.parametrize("name", ["results", "params/more", ".env"])
def test_what_lies_beside_a_checkpoint_is_not_deleted_with_it(tmp_path: Path, name: str) -> None:
    write(tmp_path / "old", "old")
    (tmp_path / "old" / ".DS_Store").touch()
    (tmp_path / "old" / name).write_text("years of work")
    with pytest.raises(CheckpointError, match=f"also holds {name}, .*move it away first"):
        write(tmp_path / "old", overwrite=True)
    assert (tmp_path / "old" / name).exists() and names(tmp_path) == ["old"]
    (tmp_path / "old" / name).unlink()

    def somebody() -> None:
        (tmp_path / "old" / name).write_text("years of work")

    with pytest.raises(CheckpointError, match="everything is written"):
        write(tmp_path / "old", overwrite=True, meanwhile=somebody)
    assert (tmp_path / "old" / name).exists()


def test_the_remedy_for_a_damaged_destination_can_be_followed(tmp_path: Path) -> None:
    write(tmp_path / "old", "old")
    (tmp_path / "old" / MANIFEST).write_text('{"format": 2, "leaves": {}}')
    with pytest.raises(CheckpointError, match="it is damaged.*; remove it, or choose another name$"):
        write(tmp_path / "old", overwrite=True)


def test_what_appears_in_an_empty_directory_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"everything is written.*config.json has appeared in it"):
        write(tmp_path, meanwhile=lambda: (tmp_path / "config.json").write_text("mine"))
    assert (tmp_path / "config.json").read_text() == "mine" and names(tmp_path) == [".partial", "config.json"]
    assert names(tmp_path / ".partial") == sorted(WRITTEN)


def test_a_directory_that_is_no_longer_empty_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"everything is written.*thesis.txt has appeared in it"):
        write(tmp_path, meanwhile=lambda: (tmp_path / "thesis.txt").write_text("mine"))
    assert names(tmp_path) == [".partial", "thesis.txt"] and names(tmp_path / ".partial") == sorted(WRITTEN)


def test_a_move_out_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, "rename", lambda a, b: Path(b) == tmp_path / MANIFEST, errno.EIO)
        with pytest.raises(CheckpointError, match=r"everything is written.*complete in .*\.partial"):
            write(tmp_path)
    assert names(tmp_path) == [".partial"] and names(tmp_path / ".partial") == sorted(WRITTEN)


def test_a_move_out_that_is_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def kill(a: Path, b: Path) -> None:
        if Path(b) == tmp_path / MANIFEST:
            raise KeyboardInterrupt
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, "old")
    assert (tmp_path / "config.json").exists()
    write(tmp_path)
    assert names(tmp_path) == sorted(WRITTEN) and (tmp_path / "config.json").read_text() == "new"


def test_a_lock_whose_name_lasts_until_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where an open file that is removed keeps a name beginning with .nfs."""
    unlink, close, left = os.unlink, os.close, []

    def rename(path: Path, *more: object, **named: object) -> None:
        if Path(path).name != MARKER:
            return unlink(path, *more, **named)  # type: ignore[arg-type]
        os.rename(path, Path(path).with_name(".nfs0001"))
        left.append(Path(path).with_name(".nfs0001"))

    def closed(descriptor: int) -> None:
        close(descriptor)
        while left:
            unlink(left.pop())

    monkeypatch.setattr(os, "unlink", rename)
    monkeypatch.setattr(os, "close", closed)
    write(tmp_path)
    assert names(tmp_path) == sorted(WRITTEN)


def disk(monkeypatch: pytest.MonkeyPatch, folder: Path, total: int) -> None:
    def usage(_: Path) -> tuple[int, int, int]:
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return shutil._ntuple_diskusage(total, used, max(total - used, 0))  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_room_is_counted_without_what_an_interrupted_run_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / MARKER).touch()
    (tmp_path / ".new.partial" / "stale").write_bytes(bytes(6000))
    disk(monkeypatch, tmp_path, 10_000)
    with publish(tmp_path / "new", needed=8000):
        pass
    (tmp_path / "new").rmdir()
    with pytest.raises(CheckpointError, match=r"needs 12.0 kB, 10.0 kB are free; choose another disk"):
        write_needing(tmp_path / "new", 12_000)
    assert names(tmp_path) == []
    disk(monkeypatch, tmp_path, 0)
    write_needing(tmp_path / "new", 12_000)


def write_needing(destination: Path, needed: int) -> None:
    with publish(destination, needed=needed):
        pass


def test_a_mount_point_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "old", "old")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "old")
    with pytest.raises(CheckpointError, match="mount point and cannot be replaced; empty it"):
        write(tmp_path / "old", overwrite=True)
    assert (tmp_path / "old" / "config.json").read_text() == "old" and names(tmp_path) == ["old"]


def test_what_a_killed_replacement_left_is_removed_or_put_back(tmp_path: Path) -> None:
    write(tmp_path / "old", "old")
    shutil.copytree(tmp_path / "old", tmp_path / ".old.replaced")
    (tmp_path / "old" / MARKER).touch()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="old exists; choose another name"):
            write(tmp_path / "old")
        assert names(tmp_path) == ["old"] and names(tmp_path / "old") == sorted(WRITTEN)
        (tmp_path / "old").rename(tmp_path / ".old.replaced")
    assert names(tmp_path) == [".old.replaced"]
