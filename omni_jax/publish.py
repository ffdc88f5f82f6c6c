"""How a directory is written: under a hidden name, and given its own name only when it is complete.

Everything that can be known about a destination is checked before the work. A directory that does not exist is built
beside its place and renamed. One that exists and is empty, which may be a mount point or belong to a folder that is not
ours to write, is built inside itself. Links are followed. What is finished is never deleted: if the last rename fails,
the error says where the result lies.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import jax

from omni_jax.errors import CheckpointError
from omni_jax.files import reason_of, user_path
from omni_jax.manifest import MANIFEST, MARKER, PARTIAL

# Longer names are hidden under a hash: a file system's limit is 255 bytes, and ours is longer by ".partial".
LONGEST_NAME = 200
# What is written below the destination has paths of up to so many bytes.
INNER_PATH_BYTES = 120
# What a file system keeps in its root, which counts as empty all the same.
OF_THE_DISK = ("lost+found",)


@dataclass(frozen=True)
class Place:
    """Where a directory will lie, links followed, and the hidden directories that it is built in and replaced by."""

    final: Path
    partial: Path
    replaced: Path


@contextmanager
def publish(destination: str | Path, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """Yield a hidden directory that becomes `destination` when the block succeeds and disappears when it fails.

    needed: bytes that will be written. What an interrupted run left is removed. CheckpointError for a destination that
    cannot be written, has no room, is being written by another process, exists, or (with `overwrite`) is not a
    checkpoint of ours.
    """
    place = place_of(destination)
    primary = jax.process_index() == 0
    lock = _claim(place, overwrite, needed) if primary else None
    _barrier(f"claimed {place.partial}")
    try:
        try:
            yield place.partial
            _barrier(f"written {place.partial}")
        except BaseException as error:
            if primary:
                shutil.rmtree(place.partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"{place.final}: could not be written ({error.strerror or reason_of(error)})"
                ) from error
            raise
        if primary:
            _finish(place, overwrite)
    finally:
        if lock is not None:
            os.close(lock)
    _barrier(f"published {place.partial}")


def place_of(destination: str | Path) -> Place:
    """Where a destination will lie; CheckpointError for what is no path, or a link that leads in a circle."""
    path = user_path(destination, "the destination")
    try:
        final = path.resolve()
        if final.is_symlink():
            raise OSError("a link that leads to itself")
        inside = final.is_dir() and not (final / MANIFEST).exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({reason_of(error)}); choose another name") from None
    name = (
        final.name if len(os.fsencode(final.name)) <= LONGEST_NAME else hashlib.sha256(os.fsencode(final)).hexdigest()
    )
    partial = final / PARTIAL if inside else final.parent / f".{name}.partial"
    return Place(final, partial, final.parent / f".{name}.replaced")


def _claim(place: Place, overwrite: bool, needed: int) -> int:
    """Check the destination, make the hidden directory ours, exclusively, and return the lock's descriptor."""
    try:
        if place.replaced.exists() and not place.final.exists():
            os.rename(place.replaced, place.final)
        _check_free(place, overwrite)
        _check_room(place.final, needed)
        place.partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(place.partial / MARKER, os.O_CREAT | os.O_RDWR, 0o600)
        _lock(lock, place)
        for path in place.partial.iterdir():
            if path.name != MARKER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{place.final}: cannot be written ({reason_of(error)}); choose another name or another disk"
        ) from error
    return lock


def _check_free(place: Place, overwrite: bool) -> None:
    """CheckpointError if something is in the way that is not ours to replace."""
    final, partial = place.final, place.partial
    if len(os.fsencode(partial)) + INNER_PATH_BYTES > os.pathconf("/", "PC_PATH_MAX"):
        raise CheckpointError(f"{final}: the path is too long for the files in it; choose a shorter one")
    if os.path.lexists(final) and not final.is_dir():
        raise CheckpointError(f"{final} is a file; choose another name")
    if partial.exists() and any(partial.iterdir()) and not (partial / MARKER).exists():
        raise CheckpointError(f"{partial} exists and is not an interrupted conversion; remove or rename it")
    if not final.is_dir() or not [p for p in final.iterdir() if p != partial and p.name not in OF_THE_DISK]:
        return
    if not (final / MANIFEST).is_file():
        raise CheckpointError(f"{final} exists and is not a checkpoint of omni_jax; choose another name")
    if not overwrite:
        raise CheckpointError(f"{final} exists; choose another name, or overwrite it with --overwrite")
    if os.path.ismount(final):
        raise CheckpointError(f"{final} is a mount point and cannot be replaced; empty it, or choose a name below it")


def _check_room(final: Path, needed: int) -> None:
    """CheckpointError, before the first byte, for what cannot fit."""
    above = final
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if free < needed:
        raise CheckpointError(
            f"{final}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; choose another disk"
        )


def _lock(descriptor: int, place: Place) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(place.partial / MARKER)  # Gone if the other process has just finished and renamed the directory.
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise CheckpointError(f"{place.final} is being written by another process") from None
    except OSError:
        pass  # Some network file systems know no locks.


def _finish(place: Place, overwrite: bool) -> None:
    """Give a complete directory its name; a checkpoint that it replaces is moved aside first, and back if we die."""
    try:
        if place.partial.parent == place.final:
            _move_out(place)
            return
        if overwrite and (place.final / MANIFEST).exists():
            shutil.rmtree(place.replaced, ignore_errors=True)
            os.rename(place.final, place.replaced)
        os.rename(place.partial, place.final)
    except OSError as error:
        with suppress(OSError):
            (place.partial / MARKER).unlink()
        if place.replaced.exists() and not place.final.exists():
            os.rename(place.replaced, place.final)
        raise CheckpointError(
            f"{place.final}: everything is written, but cannot get this name ({reason_of(error)}); it is complete in "
            f"{place.partial}, move it from there"
        ) from error
    (place.final / MARKER).unlink()
    shutil.rmtree(place.replaced, ignore_errors=True)


def _move_out(place: Place) -> None:
    """Move what was built inside a directory up into it: the manifest, which makes it a checkpoint, comes last."""
    for path in sorted(place.partial.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.name != MARKER:
            os.rename(path, place.final / path.name)
    (place.partial / MARKER).unlink()
    place.partial.rmdir()


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
