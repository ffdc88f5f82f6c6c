"""The manifest of a converted checkpoint: every array and every file of it with its hash, and a hash of itself.

    format     2; 1, which has neither `files` nor `sha256`, is read too
    leaves     shape, dtype and SHA-256 by tensor of every array, by its path
    files      size and SHA-256 of every other file, by its path in the directory
    sha256     of all of the above

Hashes by tensor show that an array is the one that was converted; hashes by file show that a copy is complete.
Loading compares the sizes of all files and the hashes of the small ones, `convert.verify` compares everything.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import CheckpointError, MismatchError
from omni_jax.files import parse_json, read_bytes, reason_of
from omni_jax.weights.contents import (
    HIDDEN_JUNK,
    JUNK,
    LOADED,
    MANIFEST,
    MARKER,
    PARAMS,
    PARTIAL,
    FileRecord,
    array_names,
    hash_files,
    metadata_files,
    record_files,
)

# The format that is written, and those that are read.
FORMAT, FORMATS = 2, (1, 2)
# Files up to this size are hashed whenever a checkpoint is loaded.
SMALL_BYTES = 1 << 20
COPY_AGAIN = "the checkpoint is damaged: copy it again, or convert it again"


@dataclass(frozen=True)
class LeafRecord:
    """Shape and dtype of one array, and SHA-256 by tensor: of the tensors it was made of, or of itself by its path."""

    shape: tuple[int, ...]
    dtype: str
    sha256: dict[str, str]

    def held_as(self, dtype: str | None) -> str:
        """The type that it is held in where `dtype` is asked for, None for as stored; weights of eight bits stay so."""
        return self.dtype if dtype is None or self.dtype == "int8" else dtype


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: a record for every array, by its path ("thinker/layers/qkv"), and for every file."""

    leaves: dict[str, LeafRecord]
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """The sub-models present, in the order of the file."""
        return tuple(dict.fromkeys(path.split("/")[0] for path in self.leaves))

    def small_files(self) -> dict[str, FileRecord]:
        """The model's own small files: configuration, tokenizer, template."""
        return {name: record for name, record in self.files.items() if not name.startswith(f"{PARAMS}/")}

    def array_files(self) -> dict[str, FileRecord]:
        """The files that hold the arrays."""
        return {name: record for name, record in self.files.items() if name.startswith(f"{PARAMS}/")}


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a checkpoint; CheckpointError, with the remedy, for anything that is not a complete one.

    Where it or the arrays are damaged or missing, this is a MismatchError.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise CheckpointError(f"{directory}: {_diagnosis(directory)}")
    manifest = _parsed(read_bytes(path, remedy=COPY_AGAIN), path)
    if not (directory / PARAMS).is_dir():
        raise MismatchError(f"{directory}: '{PARAMS}' is missing; copy the checkpoint completely or convert it again")
    return manifest


def write_manifest(directory: Path, leaves: dict[str, LeafRecord], progress: bool = False) -> Manifest:
    """Write and return the manifest of a directory whose other files are complete, and flush it to the disk.

    progress: a bar on stderr while all files are read.
    """
    from omni_jax import __version__

    manifest = Manifest(leaves, record_files(directory, progress))
    values: dict[str, Any] = {"format": FORMAT, "omni_jax": __version__, **asdict(manifest)}
    values["sha256"] = own_hash(values)
    with (directory / MANIFEST).open("w") as stream:
        json.dump(values, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    return manifest


def own_hash(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest's values but for the hash itself, whatever its spaces and order."""
    rest = {name: value for name, value in values.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def surplus(directory: Path, manifest: Manifest) -> list[str]:
    """Files that loading would read and the manifest does not know; none for a manifest without files."""
    if not manifest.files:
        return []
    found = [name for name in LOADED if os.path.lexists(directory / name)]
    return sorted(name for name in [*found, *array_names(directory)] if name not in manifest.files)


def unnamed(directory: Path, manifest: Manifest) -> list[str]:
    """Files and folders of a checkpoint that were not written with it, but for what systems leave everywhere."""
    small = manifest.files or [path.name for path in metadata_files(directory)]
    known = {MANIFEST, PARAMS, MARKER, PARTIAL, *JUNK, *small}
    found = [name for name in os.listdir(directory) if name not in known and not name.startswith(HIDDEN_JUNK)]
    return sorted(found) + surplus(directory, manifest)


def is_ours(directory: Path) -> bool:
    """Whether a directory holds a manifest of a checkpoint, complete or damaged; other programs use the name too."""
    try:
        values = parse_json(read_bytes(directory / MANIFEST), MANIFEST)
    except CheckpointError:
        return False
    return isinstance(values, dict) and {"format", "leaves"} <= values.keys()


def is_converted(directory: Path) -> bool:
    """Whether a directory is a converted checkpoint: complete, unfinished or damaged, but not a Hugging Face one."""
    if is_ours(directory):
        return True
    traces = (MANIFEST, PARAMS, MARKER, f"{PARTIAL}/{MARKER}")
    return any(os.path.lexists(directory / name) for name in traces) and not any(directory.glob("*.safetensors"))


def identity(directory: Path) -> str:
    """A hash that identifies a model: equal for two conversions of the same files, different for other files.

    Of a Hugging Face directory, all files that loading reads are hashed.
    """
    known = [name for name in LOADED if (directory / name).is_file()]
    if not is_converted(directory):
        weights = [path.name for path in directory.glob("*.safetensors") if not path.name.startswith(".")]
        return own_hash(
            {"files": {name: record.sha256 for name, record in hash_files(directory, known + weights).items()}}
        )
    manifest = read_manifest(directory)
    if not all(leaf.sha256 for leaf in manifest.leaves.values()):
        # Where several processes wrote a checkpoint, none saw its arrays whole: then their files count.
        known += manifest.array_files() or array_names(directory)
    files = {name: record for name, record in manifest.files.items() if name in known}
    files = files if manifest.files else hash_files(directory, known)
    return own_hash({"leaves": asdict(manifest)["leaves"], "files": {n: r.sha256 for n, r in files.items()}})


@lru_cache(maxsize=2)
def _parsed(data: bytes, path: Path) -> Manifest:
    """A manifest out of its JSON, kept because loading needs it several times and a large one takes 0.1 s to read."""
    values = parse_json(data, str(path), error=MismatchError, remedy=COPY_AGAIN)
    try:
        if _count(values["format"]) not in FORMATS:
            text = f"format {values['format']}, this version reads {FORMATS[0]} to {FORMAT}; update omni_jax"
            raise CheckpointError(f"{path}: {text}")
        if values["format"] == FORMAT and values["sha256"] != own_hash(values):
            raise MismatchError(f"{path}: differs from what was written; {COPY_AGAIN}")
        return Manifest(_leaves(values["leaves"]), _files(values["files"]) if values["format"] == FORMAT else {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise MismatchError(f"{path}: an entry is wrong ({reason_of(error)}); {COPY_AGAIN}") from None


def _leaves(values: dict[str, Any]) -> dict[str, LeafRecord]:
    leaves = {
        path: LeafRecord(tuple(_count(n) for n in leaf["shape"]), _dtype(leaf["dtype"]), _texts(leaf["sha256"]))
        for path, leaf in values.items()
    }
    for path in leaves:
        names = path.split("/")
        if "" in names or any("/".join(names[:i]) in leaves for i in range(1, len(names))):
            raise ValueError(f"array {path[:80]!r}")
    return leaves


def _files(values: dict[str, Any]) -> dict[str, FileRecord]:
    for name in values:
        if name.startswith("/") or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"file {name[:80]!r}")
    return {name: FileRecord(_count(file["bytes"]), str(file["sha256"])) for name, file in values.items()}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{str(value)[:40]!r} is no size")
    return value


def _dtype(value: Any) -> str:
    dtype = np.dtype(value)
    if dtype.hasobject or dtype.shape or dtype.fields:
        raise ValueError(f"dtype {str(value)[:40]!r}")
    return str(dtype)


def _texts(values: Any) -> dict[str, str]:
    if not all(isinstance(text, str) for text in values.values()):
        raise ValueError("a hash that is not text")
    return dict(values)


def _diagnosis(directory: Path) -> str:
    """Why a directory without a manifest is not a converted checkpoint, and what to do; MismatchError if it is one."""
    if not os.path.isdir(directory):
        return (
            "not a directory; name the one that the file is in" if os.path.lexists(directory) else "no such directory"
        )
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError as error:
        return f"cannot be read ({reason_of(error)})"
    if MANIFEST in names:
        return "cannot be read (permission denied); ask its owner to let you read it"
    if MARKER in names or os.path.exists(directory / PARTIAL / MARKER):
        return "an unfinished conversion; run it again"
    if any(name.endswith(".safetensors") for name in names):
        return f"a Hugging Face checkpoint; convert it with `python -m convert {directory} DST`, or use omni_jax.load"
    if PARAMS in names:
        raise MismatchError(f"{directory}: '{MANIFEST}' is missing; copy the checkpoint completely or convert it again")
    return f"not a converted checkpoint ('{MANIFEST}' is missing)"
