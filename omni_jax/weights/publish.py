"""How a directory is written: under a hidden name, and given its own name only when it is complete.

Everything that can be known about a destination (`destination`) is checked before the work. What is finished is never
deleted: if the last rename fails, the error says where the result is.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

from omni_jax.distributed import barrier
from omni_jax.errors import CheckpointError
from omni_jax.files import reason_of
from omni_jax.weights.contents import MANIFEST, MARKER
from omni_jax.weights.destination import (
    Place,
    check_free,
    check_path,
    check_replaceable,
    check_room,
    in_the_way,
    moved,
    place_of,
)


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
    barrier(f"claimed {place.partial}")
    try:
        try:
            yield place.partial
            barrier(f"written {place.partial}")
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
    barrier(f"published {place.partial}")


def _claim(place: Place, overwrite: bool, needed: int) -> int:
    """Check the destination, claim the hidden directory for this process, and return the descriptor of its lock."""
    try:
        check_path(place)
        if not place.partial.exists():
            check_room(place.final, needed)
        place.partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(place.partial / MARKER, os.O_CREAT | os.O_RDWR, 0o600)
        _lock(lock, place)
        try:
            _tidy(place)
            check_free(place, overwrite)
            _clear(place)
            check_room(place.final, needed)
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


def _move_back(place: Place) -> None:
    for name in moved(place):
        os.rename(place.final / name, place.partial / name)


def _tidy(place: Place) -> None:
    """Undo or complete the last step of a run that was interrupted in it."""
    if (place.final / MANIFEST).exists():
        (place.final / MARKER).unlink(missing_ok=True)
        shutil.rmtree(place.replaced, ignore_errors=True)
    elif place.replaced.exists() and not place.final.exists():
        os.rename(place.replaced, place.final)


def _clear(place: Place) -> None:
    """Remove what an interrupted run left, all but the marker, which is locked."""
    _move_back(place)
    for path in place.partial.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (place.partial / MARKER).write_text("")


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
        if place.inside:
            _move_out(place)
            return
        if overwrite and (place.final / MANIFEST).exists():
            check_replaceable(place.final)
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
    if more := in_the_way(place):
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
