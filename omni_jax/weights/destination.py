"""Where a directory may be written: its place, and what is checked of it before and after the work.

A destination that does not exist is built next to its place. One that exists and is empty, which may be a mount point
or be in a folder that we may not write to, is built inside itself. Links are followed.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

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

    @property
    def inside(self) -> bool:
        """Whether the hidden directory is in the one that it will fill."""
        return self.partial.parent == self.final


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


def check_path(place: Place) -> None:
    """CheckpointError if something is in the way that can never be replaced; nothing is changed."""
    final, partial = place.final, place.partial
    if len(os.fsencode(partial)) + INNER_PATH_BYTES > os.pathconf("/", "PC_PATH_MAX"):
        raise CheckpointError(f"{final}: the path is too long for the files in it; choose a shorter one")
    if os.path.lexists(final) and not final.is_dir():
        raise CheckpointError(f"{final} is a file; choose another name")
    if partial.exists() and any(partial.iterdir()) and not (partial / MARKER).exists():
        raise CheckpointError(f"{partial} exists and is not an interrupted conversion; remove or rename it")
    if not in_the_way(place):
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


def in_the_way(place: Place) -> list[str]:
    """The names in the destination, except those that an interrupted run has moved there."""
    if not place.final.is_dir():
        return []
    known = {place.partial.name if place.inside else "", *OF_THE_DISK, *moved(place)}
    return [name for name in os.listdir(place.final) if name not in known]


def moved(place: Place) -> list[str]:
    """The names that an interrupted run has moved out of the hidden directory, into its parent."""
    if not place.inside:
        return []
    try:
        names = json.loads((place.partial / MARKER).read_text() or "[]")
    except (OSError, ValueError):
        return []
    names = [n for n in names if isinstance(n, str) and n == os.path.basename(n)] if isinstance(names, list) else []
    return [n for n in names if os.path.lexists(place.final / n) and not os.path.lexists(place.partial / n)]


def check_free(place: Place, overwrite: bool) -> None:
    """CheckpointError if a checkpoint is in the way that is not to be replaced, or holds more than was written."""
    if not in_the_way(place):
        return
    if place.inside:
        raise CheckpointError(f"{place.final} has just been written by another process")
    if not overwrite:
        raise CheckpointError(f"{place.final} exists; choose another name, or overwrite it with --overwrite")
    check_replaceable(place.final)


def check_replaceable(final: Path) -> None:
    """CheckpointError unless a directory is a converted checkpoint and nothing else is in it."""
    if more := unnamed(final, read_manifest(final)):
        raise CheckpointError(f"{final} also holds {more[0]}, which was not written with it; move it away first")


def check_room(final: Path, needed: int) -> None:
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
