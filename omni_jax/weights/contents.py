"""The files of a checkpoint directory: which belong to it, their sizes and hashes, and how they differ from a record.

Small files (configuration, tokenizer, template) are in the directory itself, arrays in its folder `params`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from omni_jax.errors import CheckpointError
from omni_jax.files import read_bytes, reason_of
from omni_jax.process import check

MANIFEST, PARAMS = "manifest.json", "params"
# A file in a directory that is being written, and the name of such a directory within its destination.
MARKER, PARTIAL = ".unfinished", ".partial"
METADATA_SUFFIXES = (".json", ".jinja", ".txt")
MAX_METADATA_BYTES = 64 << 20
# The small files that loading looks for: one that is added changes what is loaded. Other additions do no harm.
LOADED = (
    *("config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
# What file managers leave in every folder that they show; hidden files are ignored anyway.
JUNK = ("Thumbs.db", "desktop.ini")
# Names of hidden files that systems leave everywhere begin so.
HIDDEN_JUNK = (".DS_Store", "._", ".nfs", ".Trash")
# Files are hashed by this number of threads, a block of this number of bytes at a time.
THREADS, BLOCK_BYTES = 8, 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


def record_files(directory: Path, progress: bool = False) -> dict[str, FileRecord]:
    """Size and hash of every file of a checkpoint but for the manifest."""
    return hash_files(directory, _names(directory), progress)


def hash_files(directory: Path, names: Iterable[str], progress: bool = False) -> dict[str, FileRecord]:
    """Size and hash of some files of a directory by their relative paths; progress: a bar on stderr."""
    from tqdm import tqdm

    names = sorted(names)
    try:
        sizes = [(directory / name).stat().st_size for name in names]
        with (
            tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="hash", disable=not progress) as bar,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            hashes = pool.map(lambda name: _hash(directory / name, bar.update), names)
            return dict(zip(names, map(FileRecord, sizes, hashes), strict=True))
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: cannot be read ({reason_of(error)})") from None


def differences(directory: Path, files: dict[str, FileRecord], most: float) -> Iterator[tuple[str, str]]:
    """Files of a checkpoint that are not what was recorded, each with what is wrong with it.

    most: the largest size, in bytes, of a file that is hashed; of larger ones only the size is compared.
    CheckpointError for a file that the user may not read.
    """

    def wrong(name: str) -> str | None:
        record = files[name]
        try:
            size = (directory / name).stat().st_size
            if size != record.bytes:
                return f"has {size:,} bytes, {record.bytes:,} were written"
            return None if size > most or _hash(directory / name) == record.sha256 else "differs from what was written"
        except FileNotFoundError:
            return "is missing"
        except PermissionError:
            raise CheckpointError(
                f"{directory / name}: cannot be read (permission denied); ask its owner to let you read it"
            ) from None
        except OSError as error:
            return f"cannot be read ({reason_of(error)})"

    with ThreadPoolExecutor(THREADS) as pool:
        for name, what in zip(files, pool.map(wrong, files), strict=True):
            if what is not None:
                yield name, what


def metadata_files(directory: Path) -> list[Path]:
    """The small JSON, template and text files of a model; never weights, indices, manifests, code or hidden files."""
    try:
        return [
            path
            for path in sorted(directory.iterdir())
            if path.suffix in METADATA_SUFFIXES
            and not path.name.startswith(".")
            and not path.name.endswith(".safetensors.index.json")
            and path.name != MANIFEST
            and path.is_file()
            and path.stat().st_size <= MAX_METADATA_BYTES
        ]
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({reason_of(error)})") from None


def copy_metadata(paths: list[Path], directory: Path) -> None:
    """Copy small files; CheckpointError names one that cannot be read."""
    for path in paths:
        (directory / path.name).write_bytes(read_bytes(path, most=MAX_METADATA_BYTES))


def _names(directory: Path) -> Iterator[str]:
    """Relative paths of a checkpoint's files but the manifest and hidden ones."""
    for path in directory.iterdir():
        if path.name != MANIFEST and path.name not in JUNK and not path.name.startswith(".") and path.is_file():
            yield path.name
    yield from array_names(directory)


def array_names(directory: Path) -> list[str]:
    """Relative paths of the files that hold the arrays; the folder may be a link to another disk."""

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: cannot be read ({reason_of(error)})") from None

    root, names = os.path.realpath(directory / PARAMS), []
    for folder, _, files in os.walk(root, onerror=refuse):
        names += [os.path.relpath(os.path.join(folder, file), root) for file in files if file not in JUNK]
    plain = (name.replace(os.sep, "/") for name in names)
    return sorted(f"{PARAMS}/{name}" for name in plain if not any(part.startswith(".") for part in name.split("/")))


def _hash(path: Path, seen: Callable[[int], object] = int) -> str:
    """SHA-256 of a file; `seen` is called with the size of each block. A command that was interrupted ends here."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(BLOCK_BYTES):
            check()
            digest.update(piece)
            seen(len(piece))
    return digest.hexdigest()
