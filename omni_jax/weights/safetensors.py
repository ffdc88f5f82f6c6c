"""Reading a Hugging Face checkpoint directory that nobody vouches for: headers, names, sizes, and raw bytes.

Only `config.json`, the safetensors index and safetensors files are read; pickle files are refused and `auto_map` is
ignored, so nothing in the directory is ever executed. Each header is checked completely before a byte of data is read:
its size, duplicate names, and that the tensors tile the file exactly. Files must lie in the directory itself or, for
the Hugging Face cache, in the `blobs` beside its `snapshots`.

Data is read with `pread` at the offsets of the header, not mapped, so that resident memory is what we asked for.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.files import parse_json, read_json, read_object, reason_of, user_path
from omni_jax.weights.manifest import is_ours

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
AGAIN = "download it again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Bits of one value for every dtype that safetensors knows, and the ones that can be weights here.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F16": 16,
    "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
WEIGHT_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}

# What people save under the name of a safetensors file, by its first bytes.
IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page, perhaps a login or error page; download the file again"),
    (b"<html", "an HTML page, perhaps a login or error page; download the file again"),
    (b"PK\x03\x04", "a PyTorch pickle archive; save the model with safetensors"),
    (b"\x80\x02", "a pickle; save the model with safetensors"),
    (b"\x80\x04", "a pickle; save the model with safetensors"),
    (b"GGUF", "a GGUF file; take the safetensors release of the model"),
)


@dataclass(frozen=True)
class Tensor:
    """Shape and safetensors dtype of a tensor and where its bytes lie; `file` is None in a manifest without data."""

    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None
    start: int = 0


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint as it is on disk: its parsed config, every tensor by name, and the directory."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The tensor, or its `rows` from start to stop, in its own dtype; CheckpointError if the file ends early."""
        tensor = self.tensors[name]
        if tensor.file is None:
            raise CheckpointError(f"{self.directory}: only names and shapes are known here; there is no data to read")
        dtype = WEIGHT_DTYPES[tensor.dtype]
        start, stop = (0, tensor.shape[0]) if rows is None else rows
        row_bytes = prod(tensor.shape[1:]) * dtype.itemsize
        data = np.empty((stop - start) * row_bytes, np.uint8)
        _read_into(tensor.file, tensor.start + start * row_bytes, data.data, name)
        return data.view(dtype).reshape(stop - start, *tensor.shape[1:])


def open_checkpoint(directory: str | Path) -> SourceCheckpoint:
    """Read the config and all headers of a checkpoint directory; raise CheckpointError naming what is wrong."""
    directory = user_path(directory, "the source")
    if not os.path.isdir(directory):
        what = (
            "not a directory; name the one that the file is in" if os.path.lexists(directory) else "no such directory"
        )
        raise CheckpointError(f"{directory}: {what}")
    if is_ours(directory):
        raise CheckpointError(f"{directory}: is converted already; load it with omni_jax")
    names = _listed(directory)
    if "snapshots" in names and "config.json" not in names:
        raise CheckpointError(f"{directory}: a folder of the Hugging Face cache; name one of those in its 'snapshots'")
    if os.path.lexists(directory / "config.json"):
        check_inside(directory / "config.json", directory.resolve())
    config = read_config(directory / "config.json")
    weight_map = _weight_map(directory, names)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in read_header(_safe_file(directory, file)).items():
            if name in tensors:
                raise CheckpointError(f"{directory}: tensor {name!r} is in two files, {tensors[name].file} and {file}")
            tensors[name] = tensor
    if (directory / INDEX).exists():
        _check_index(directory, weight_map, tensors)
    return SourceCheckpoint(directory, config, tensors)


def open_manifest(manifest: str | Path, config: str | Path | None = None) -> SourceCheckpoint:
    """Names and shapes from a JSON file (.json or .json.gz) instead of weights, with the config beside it.

    The file is {"tensors": {name: shape}} or the inner mapping alone; its "dtype" is taken to be every tensor's.
    """
    manifest = user_path(manifest, "the manifest")
    values = read_json(manifest, remedy="name a directory, or a JSON file of tensor names and shapes")
    names = values.get("tensors", values) if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names or not all(_is_shape(shape) for shape in names.values()):
        raise CheckpointError(f"{manifest}: not a mapping of tensor names to shapes")
    dtype = str(values.get("dtype", "bfloat16"))
    dtype = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(dtype, dtype)
    tensors = {name: Tensor(tuple(shape), dtype) for name, shape in names.items()}
    return SourceCheckpoint(manifest, read_config(Path(config or manifest.parent / "config.json")), tensors)


def read_config(path: Path) -> dict[str, Any]:
    """A parsed config.json; ConfigError where it is missing or not an object."""
    if not os.path.lexists(path):
        raise ConfigError(f"{path} is missing; take it from the checkpoint itself, the library's defaults differ")
    return read_object(path, error=ConfigError, remedy=AGAIN)


def read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file; CheckpointError unless header and data agree to the byte."""
    try:
        with path.open("rb") as stream:
            size, start = path.stat().st_size, stream.read(64)
            length = int.from_bytes(start[:8], "little")
            if not 8 + length <= size:
                raise CheckpointError(f"{path}: {_impostor(start)}")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
            stream.seek(8)
            header = parse_json(stream.read(length).decode(), str(path), remedy=AGAIN)
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: its header is no text; {AGAIN}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; {AGAIN}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header):,} tensors in one file; more than {MAX_TENSORS:,} are refused")
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    _check_tiling(path, spans, size - 8 - length)
    return {
        name: Tensor(tuple(header[name]["shape"]), header[name]["dtype"], path, 8 + length + begin)
        for name, (begin, _) in spans.items()
    }


def _impostor(start: bytes) -> str:
    """What a file is whose first eight bytes are not the length of a header that fits into it."""
    what = next((what for magic, what in IMPOSTORS if start.lower().startswith(magic.lower())), None)
    return f"is {what}" if what else "not a safetensors file, or truncated within its header; download it again"


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The data offsets of one header entry, checked against its own shape and dtype."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not _is_shape(shape) or not _is_shape([begin, end]) or not isinstance(dtype, str):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header entry of {name!r} is malformed: {str(entry)[:200]}; {AGAIN}"
        ) from error
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown dtype {dtype[:40]!r}")
    if (end - begin) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise CheckpointError(f"{path}: tensor {name!r} spans {end - begin} bytes, not those of {dtype} {shape}")
    return begin, end


def _check_tiling(path: Path, spans: dict[str, tuple[int, int]], size: int) -> None:
    """The tensors follow each other without gap or overlap and end where the file ends."""
    at = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != at:
            raise CheckpointError(f"{path}: tensor {name!r} starts at byte {begin} of the data, not at {at}")
        at = end
    if at > size:
        raise CheckpointError(f"{path}: truncated, {at - size:,} bytes are missing; download it again")
    if at < size:
        raise CheckpointError(f"{path}: {size - at:,} bytes follow the last tensor; the file is damaged")


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
        if len(files) == 1:
            return {"": files[0]}
        raise CheckpointError(f"{directory}: {_without_index(names, files)}")
    index = read_json(_safe_file(directory, INDEX), remedy=AGAIN)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{directory / INDEX}: has no 'weight_map' of tensor names to file names; {AGAIN}")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{directory / INDEX}: {len(weight_map):,} names; more than {MAX_TENSORS:,} are refused")
    unlisted = sorted(set(files) - set(weight_map.values()))
    if unlisted:
        raise CheckpointError(f"{directory}: {unlisted[0]} is not in {INDEX}; move it away or add it to the index")
    return weight_map


def _without_index(names: list[str], files: list[str]) -> str:
    """What is wrong with a directory without an index and not of one file, and what to do."""
    if files:
        return f"{len(files)} safetensors files but no {INDEX}; add the index"
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
    path, root = directory / name, directory.resolve()
    if not os.path.exists(path):
        raise CheckpointError(f"{path} is missing; download the checkpoint completely")
    check_inside(path, root)
    return path


def check_inside(path: Path, root: Path) -> None:
    """CheckpointError unless `path`, links followed, is a regular file in `root` or in its hub cache's blobs."""
    real = path.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append((root.parent.parent / "blobs").resolve())  # People move them to another disk and leave a link.
    if real.parent not in homes or not real.is_file():
        raise CheckpointError(f"{path}: leads to {real}, outside the checkpoint; copy the file into it")


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


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
