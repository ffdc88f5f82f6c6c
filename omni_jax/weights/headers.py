"""The header of one safetensors file: where each tensor's bytes are, once header and data agree to the byte.

A header is checked for its size, duplicate names, the dtype and shape of every entry, and that the tensors tile the
data exactly. Files that are something else under that name are recognised by their first bytes.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError
from omni_jax.files import parse_json, reason_of

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
DOWNLOAD_AGAIN = "download it again"

# Bits of one value for every dtype that safetensors knows, and the dtypes that can be weights here.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "F16": 16,
    "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
WEIGHT_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Weights of eight bits.
INT8 = {"I8": np.dtype(np.int8)}
DTYPE_NAMES = {dtype: name for name, dtype in (WEIGHT_DTYPES | INT8).items()}
FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
# Those that can be read: weights, and whole numbers and truth values: packed weights, a drafter's vocabulary.
WHOLE = {"BOOL": np.dtype(bool), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
NUMPY_DTYPES = WEIGHT_DTYPES | INT8 | FLOAT8 | WHOLE

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
    """Shape and safetensors dtype of a tensor, and where its bytes start; `file` is None in a manifest without data."""

    shape: tuple[int, ...]
    dtype: str
    file: Path | None = None
    start: int = 0


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
            header = parse_json(stream.read(length).decode(), str(path), remedy=DOWNLOAD_AGAIN)
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: its header cannot be read as UTF-8; {DOWNLOAD_AGAIN}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; {DOWNLOAD_AGAIN}")
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
        if not is_shape(shape) or not is_shape([begin, end]) or not isinstance(dtype, str):
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header entry of {name!r} is malformed: {str(entry)[:200]}; {DOWNLOAD_AGAIN}"
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


def is_shape(value: Any) -> bool:
    """Whether a value of a JSON file is a list of whole numbers from 0."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
