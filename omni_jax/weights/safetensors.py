"""An untrusted directory of safetensors files, of a model or a drafter: its configuration, tensor names and raw bytes.

Only `config.json`, the safetensors index and safetensors files are read; pickle files are refused and `auto_map` is
ignored, so nothing in the directory is ever executed. Each header (`headers`) is checked completely before a byte of
data is read. Files must be in the directory itself or, for the Hugging Face cache, in the `blobs` beside its
`snapshots`; a download that was not completed is an error that names the file.

Data is read with `pread` at the offsets of the header, not mapped, so resident memory is what the caller asked for.
"""

import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.files import read_json, read_object, reason_of, user_path
from omni_jax.weights.contents import LOADED, METADATA_SUFFIXES, metadata_files
from omni_jax.weights.headers import DOWNLOAD_AGAIN, MAX_TENSORS, NUMPY_DTYPES, Tensor, is_shape, read_header
from omni_jax.weights.manifest import is_ours

INDEX = "model.safetensors.index.json"
# Files that run code when they are opened.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The name of one of several files, which mean nothing without their index.
SHARD = re.compile(r".*-\d+-of-(\d+)\.safetensors")
# What download tools add to the name of a file that they have not completed.
UNFINISHED = (".incomplete", ".part", ".aria2", ".crdownload", ".tmp")


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint as it is on disk: the directory, its parsed config and where that is, and every tensor by name."""

    directory: Path
    config: dict[str, Any]
    config_file: Path
    tensors: dict[str, Tensor]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The tensor of the header's shape and dtype, or its `rows` from start to stop along the first axis.

        CheckpointError if the file ends early.
        """
        tensor = self.tensors[name]
        if tensor.file is None:
            raise CheckpointError(f"{self.directory}: only names and shapes are known here; there is no data to read")
        dtype = NUMPY_DTYPES[tensor.dtype]
        start, shape = 0, tensor.shape
        if rows is not None:
            start, shape = rows[0], (rows[1] - rows[0], *tensor.shape[1:])
        data = np.empty(prod(shape) * dtype.itemsize, np.uint8)
        _read_into(tensor.file, tensor.start + start * prod(shape[1:]) * dtype.itemsize, data.data, name)
        return data.view(dtype).reshape(shape)


def open_checkpoint(directory: Path) -> SourceCheckpoint:
    """Read the config and all headers of a directory that exists; CheckpointError names what is wrong in it."""
    if is_ours(directory):
        raise CheckpointError(f"{directory}: is converted already; load it with omni_jax")
    names = _listed(directory)
    if "config.json" not in names:
        _refuse_cache(directory, names)
    _check_links(directory, names)
    _check_complete(directory, names)
    for path in metadata_files(directory):
        check_inside(path, directory.resolve())
    config_file = directory / "config.json"
    config = read_config(config_file)
    weight_map = _weight_map(directory, names)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in read_header(_safe_file(directory, file)).items():
            if name in tensors:
                raise CheckpointError(f"{directory}: tensor {name!r} is in two files, {tensors[name].file} and {file}")
            tensors[name] = tensor
    if (directory / INDEX).exists():
        _check_index(directory, weight_map, tensors)
    return SourceCheckpoint(directory, config, config_file, tensors)


def open_manifest(manifest: str | Path, config: str | Path | None = None) -> SourceCheckpoint:
    """Names and shapes from a JSON file (.json or .json.gz) instead of weights, with the config beside it.

    The file is {"tensors": {name: shape}} or the inner mapping alone; its "dtype" is taken to be every tensor's.
    """
    manifest = user_path(manifest, "the manifest")
    values = read_json(manifest, remedy="name a directory, or a JSON file of tensor names and shapes")
    names = values.get("tensors", values) if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names or not all(is_shape(shape) for shape in names.values()):
        raise CheckpointError(f"{manifest}: not a mapping of tensor names to shapes")
    dtype = str(values.get("dtype", "bfloat16"))
    dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(dtype, dtype)
    tensors = {name: Tensor(tuple(shape), dtype) for name, shape in names.items()}
    config_file = Path(config or manifest.parent / "config.json")
    return SourceCheckpoint(manifest, read_config(config_file), config_file, tensors)


def read_config(path: Path) -> dict[str, Any]:
    """A parsed config.json; ConfigError where it is missing or not an object."""
    if not os.path.lexists(path):
        raise ConfigError(f"{path} is missing; take it from the checkpoint itself, the library's defaults differ")
    return read_object(path, error=ConfigError, remedy=DOWNLOAD_AGAIN)


def _listed(directory: Path) -> list[str]:
    """The names in a directory but for hidden ones, which a Mac leaves beside each file ("._model.safetensors")."""
    try:
        return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({reason_of(error)})") from None


def _weight_map(directory: Path, names: list[str]) -> dict[str, str]:
    """Tensor name -> file name; for a checkpoint in one file, its name under ''. names: what the directory holds."""
    files = [name for name in names if name.endswith(".safetensors")]
    if INDEX not in names:
        if len(files) == 1 and _is_whole(files[0]):
            return {"": files[0]}
        raise CheckpointError(f"{directory}: {_without_index(names, files)}")
    index = read_json(_safe_file(directory, INDEX), remedy=DOWNLOAD_AGAIN)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()) or not weight_map:
        raise CheckpointError(
            f"{directory / INDEX}: has no 'weight_map' of tensor names to file names; {DOWNLOAD_AGAIN}"
        )
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{directory / INDEX}: {len(weight_map):,} names; more than {MAX_TENSORS:,} are refused")
    unlisted = sorted(set(files) - set(weight_map.values()))
    if unlisted:
        raise CheckpointError(f"{directory}: {unlisted[0]} is not in {INDEX}; move it away or add it to the index")
    return weight_map


def _is_whole(file: str) -> bool:
    """Whether a file is a checkpoint by itself, as far as its name says, rather than one of several shards."""
    shard = SHARD.fullmatch(file)
    return shard is None or int(shard[1]) == 1


def _without_index(names: list[str], files: list[str]) -> str:
    """What is wrong with a directory without an index and not of one file, and what to do."""
    if files:
        shard = next(filter(None, map(SHARD.fullmatch, files)), None)
        more = f", and {int(shard[1])} shards belong together" if shard else ""
        return f"{len(files)} safetensors files but no {INDEX}{more}; add the index"
    if unfinished := [name for name in names if name.endswith(UNFINISHED)]:
        return f"{unfinished[0]} is a download that was not completed; download it again"
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return f"only pickle files ({pickles[0]}), which can run code when they are opened; save it with safetensors"
    if any(name.endswith(".gguf") for name in names):
        return "only GGUF files; take the safetensors release of the model"
    return f"neither {INDEX} nor a .safetensors file is here; download the checkpoint completely"


def _check_index(directory: Path, weight_map: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file is None or found.file.name != file:
            raise CheckpointError(f"{directory}: {INDEX} promises tensor {name!r} in {file}, which does not hold it")
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"{directory}: tensor {name!r} of {tensor.file} is not in {INDEX}")


def _safe_file(directory: Path, name: str) -> Path:
    """The path of `name` in `directory`; CheckpointError when it leads elsewhere or is not a file."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{directory}: the index names {name!r}; only files of the directory itself are read")
    if name != INDEX and not name.endswith(".safetensors"):
        raise CheckpointError(f"{directory}: the index names {name!r}, which is not a .safetensors file")
    path = directory / name
    if not os.path.exists(path):
        raise CheckpointError(f"{path} is missing; download the checkpoint completely")
    check_inside(path, directory.resolve())
    return path


def _refuse_cache(directory: Path, names: list[str]) -> None:
    """CheckpointError for a folder of the Hugging Face cache that is above a snapshot."""
    near = (directory.parent.name, directory.name, *names)
    if "snapshots" in near[1:] or any(name.startswith("models--") for name in near):
        raise CheckpointError(f"{directory}: a folder of the Hugging Face cache; name one of those in its 'snapshots'")


def _check_links(directory: Path, names: list[str]) -> None:
    """CheckpointError for a file that is a link to nothing, as where the cache lost a blob or never completed it."""
    for name in names:
        path = directory / name
        if name.endswith((".safetensors", *METADATA_SUFFIXES)) and path.is_symlink() and not os.path.exists(path):
            target = os.path.normpath(directory.resolve() / os.readlink(path))
            begun = " was not downloaded completely" if os.path.exists(f"{target}.incomplete") else " is missing"
            raise CheckpointError(f"{path}: a link to {target}, which{begun}; download the file again")


def _check_complete(directory: Path, names: list[str]) -> None:
    """CheckpointError for a file whose download was not completed; some tools (aria2) give it its full size at once."""
    for name in names:
        file = name.removesuffix(next(filter(name.endswith, UNFINISHED), ""))
        if file != name and (file.endswith(".safetensors") or file in (INDEX, *LOADED)):
            raise CheckpointError(
                f"{directory / name} is a download that was not completed; download {file} again, or remove {name} if "
                f"{file} is complete"
            )


def check_inside(path: Path, root: Path) -> None:
    """CheckpointError unless `path`, links followed, is a regular file in `root` or in the blobs of its hub cache."""
    real = path.resolve()
    if not real.is_file():
        raise CheckpointError(f"{path}: not a regular file; download it again")
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append((root.parent.parent / "blobs").resolve())  # People move them to another disk and leave a link.
    if real.parent not in homes:
        raise CheckpointError(f"{path}: leads to {real}, outside the checkpoint; copy the file into it")


def _read_into(path: Path, offset: int, view: memoryview, name: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{path}: ended while reading {name!r}; it changed since its header was read")
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: {name!r} cannot be read ({reason_of(error)})") from error
