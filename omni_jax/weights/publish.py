"""How a directory is written: under a hidden name, and given its own name only when it is complete.

Everything that can be known about a destination is checked before the work. A directory that does not exist is built
next to its place and renamed. One that exists and is empty, which may be a mount point or be in a folder that we may
not write to, is built inside itself. Links are followed. What is finished is never deleted: if the last rename fails,
the error says where the result is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import jax

from omni_jax.errors import CheckpointError
from omni_jax.files import reason_of, user_path
from omni_jax.weights.contents import JUNK, MANIFEST, MARKER, PARTIAL
from omni_jax.weights.manifest import is_ours, read_manifest, unnamed

# Longer names are replaced by a hash: a file system's limit is 255 bytes, and the hidden name is longer than the own.
LONGEST_NAME = 200
# Room for the paths of the files below the destination.
INNER_PATH_BYTES = 120
# What a file system keeps in its root, which counts as empty all the same.
OF_THE_DISK = ("lost+found", *JUNK)
UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3}


@dataclass(frozen=True)
class Place:
    """Where a directory will be, links followed, the hidden one it is built in, and that of what it replaces."""

    final: Path
    partial: Path
    replaced: Path


@contextmanager
def publish(destination: str | Path, overwrite: bool = False, needed: int = 0) -> Iterator[Path]:
    """Yield a hidden directory that becomes `destination` when the block succeeds and disappears when it fails.

    What an interrupted run left is removed.

    Args:
        destination: the directory that is to appear.
        overwrite: replace it if it is a converted checkpoint.
        needed: bytes that will be written.

    CheckpointError for a destination that cannot be written, has no room, is being written by another process, exists,
    or (with `overwrite`) is not a converted checkpoint.
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
            with suppress(OSError):
                place.partial.rmdir()  # A network file system keeps a name for the lock until it is closed.
    _barrier(f"published {place.partial}")


def place_of(destination: str | Path) -> Place:
    """Where a destination will be; CheckpointError for what is not a path, or a link that leads in a circle."""
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
    """Check the destination, claim the hidden directory for this process, and return the descriptor of its lock."""
    try:
        _check_path(place)
        if not place.partial.exists():
            _check_room(place.final, needed)
        place.partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(place.partial / MARKER, os.O_CREAT | os.O_RDWR, 0o600)
        _lock(lock, place)
        try:
            _tidy(place)
            _check_free(place, overwrite)
            _clear(place)
            _check_room(place.final, needed)
        except BaseException:
            if os.listdir(place.partial) == [MARKER]:
                shutil.rmtree(place.partial, ignore_errors=True)
            os.close(lock)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{place.final}: cannot be written ({reason_of(error)}); choose another name or another disk"
        ) from error
    return lock


def _check_path(place: Place) -> None:
    """CheckpointError if something is in the way that can never be replaced; nothing is changed."""
    final, partial = place.final, place.partial
    if len(os.fsencode(partial)) + INNER_PATH_BYTES > os.pathconf("/", "PC_PATH_MAX"):
        raise CheckpointError(f"{final}: the path is too long for the files in it; choose a shorter one")
    if os.path.lexists(final) and not final.is_dir():
        raise CheckpointError(f"{final} is a file; choose another name")
    if partial.exists() and any(partial.iterdir()) and not (partial / MARKER).exists():
        raise CheckpointError(f"{partial} exists and is not an interrupted conversion; remove or rename it")
    if not _in_the_way(place):
        return
    if not (final / MANIFEST).is_file():
        raise CheckpointError(f"{final} exists and is not a checkpoint of omni_jax; choose another name")
    if os.path.ismount(final):
        raise CheckpointError(f"{final} is a mount point and cannot be replaced; empty it, or choose a name below it")
    try:
        read_manifest(final)
    except CheckpointError as error:
        what, remedy = f"({error})", "choose another name"
        if is_ours(final):
            what, remedy = "(it is damaged)", "remove it, or choose another name"
        raise CheckpointError(f"{final} exists and is not a complete checkpoint of omni_jax {what}; {remedy}") from None


def _in_the_way(place: Place) -> list[str]:
    """The names in the destination, except those that an interrupted run has moved there."""
    if not place.final.is_dir():
        return []
    known = {place.partial.name if place.partial.parent == place.final else "", *OF_THE_DISK, *_moved(place)}
    return [name for name in os.listdir(place.final) if name not in known]


def _moved(place: Place) -> list[str]:
    """The names that an interrupted run has moved out of the hidden directory, into its parent."""
    if place.partial.parent != place.final:
        return []
    try:
        names = json.loads((place.partial / MARKER).read_text() or "[]")
    except (OSError, ValueError):
        return []
    names = [n for n in names if isinstance(n, str) and n == os.path.basename(n)] if isinstance(names, list) else []
    return [n for n in names if os.path.lexists(place.final / n) and not os.path.lexists(place.partial / n)]


def _move_back(place: Place) -> None:
    for name in _moved(place):
        os.rename(place.final / name, place.partial / name)


def _tidy(place: Place) -> None:
    """Undo or complete the last step of a run that was interrupted in it."""
    if (place.final / MANIFEST).exists():
        (place.final / MARKER).unlink(missing_ok=True)
        shutil.rmtree(place.replaced, ignore_errors=True)
    elif place.replaced.exists() and not place.final.exists():
        os.rename(place.replaced, place.final)


def _check_free(place: Place, overwrite: bool) -> None:
    """CheckpointError if a checkpoint is in the way that is not to be replaced, or holds more than was written."""
    if not _in_the_way(place):
        return
    if place.partial.parent == place.final:
        raise CheckpointError(f"{place.final} has just been written by another process")
    if not overwrite:
        raise CheckpointError(f"{place.final} exists; choose another name, or overwrite it with --overwrite")
    _check_replaceable(place.final)


def _check_replaceable(final: Path) -> None:
    """CheckpointError unless a directory is a converted checkpoint and nothing else is in it."""
    if more := unnamed(final, read_manifest(final)):
        raise CheckpointError(f"{final} also holds {more[0]}, which was not written with it; move it away first")


def _clear(place: Place) -> None:
    """Remove what an interrupted run left, all but the marker, which is locked."""
    _move_back(place)
    for path in place.partial.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (place.partial / MARKER).write_text("")


def _check_room(final: Path, needed: int) -> None:
    """CheckpointError, before the first byte, for what cannot fit; some network disks do not state their size."""
    above = final
    while not above.exists():
        above = above.parent
    disk = shutil.disk_usage(above)
    if disk.total and disk.free < needed:
        raise CheckpointError(f"{final}: needs {_size(needed)}, {_size(disk.free)} are free; choose another disk")


def _size(count: int) -> str:
    """1_234_567 -> "1.2 MB"."""
    unit = next((unit for unit in ("GB", "MB", "kB") if count >= UNITS[unit]), "bytes")
    return f"{count / UNITS[unit]:.1f} {unit}" if unit in UNITS else f"{count} bytes"


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
            _check_replaceable(place.final)
            shutil.rmtree(place.replaced, ignore_errors=True)
            os.rename(place.final, place.replaced)
        os.rename(place.partial, place.final)
    except (OSError, CheckpointError) as error:
        with suppress(OSError):
            (place.partial / MARKER).unlink()
        if place.replaced.exists() and not place.final.exists():
            os.rename(place.replaced, place.final)
        raise CheckpointError(
            f"{place.final}: everything is written, but cannot be given this name ({reason_of(error)}); it is "
            f"complete in {place.partial}, move it from there"
        ) from error
    with suppress(OSError):
        (place.final / MARKER).unlink()
    shutil.rmtree(place.replaced, ignore_errors=True)


def _move_out(place: Place) -> None:
    """Move what was built inside a directory up into it: the manifest, which makes it a checkpoint, comes last.

    The marker names what is moved, so that it can be moved back: here, or by the next run if this one is killed.
    """
    if more := _in_the_way(place):
        raise CheckpointError(f"{more[0]} has appeared in it")
    names = sorted((n for n in os.listdir(place.partial) if n != MARKER), key=lambda name: name == MANIFEST)
    (place.partial / MARKER).write_text(json.dumps(names))
    try:
        for name in names:
            if os.path.lexists(place.final / name):
                raise CheckpointError(f"{name} has appeared in it")
            os.rename(place.partial / name, place.final / name)
    except (OSError, CheckpointError):
        _move_back(place)
        raise
    with suppress(OSError):
        (place.partial / MARKER).unlink()


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
