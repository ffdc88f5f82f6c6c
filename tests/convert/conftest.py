"""Checkpoints to convert and to damage."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import convert_checkpoint
from omni_jax.weights.contents import MANIFEST
from omni_jax.weights.manifest import own_hash

INDEX = "model.safetensors.index.json"


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face directory, by the library itself."""
    from safetensors.numpy import load_file

    return {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(edit(values) or values))


def edit_manifest(directory: Path, edit: Callable[[Any], Any]) -> None:
    """Change a converted checkpoint's manifest as if it had been written so."""

    def signed(values: dict) -> dict:
        values = edit(values) or values
        return values | {"sha256": own_hash(values)}

    edit_json(directory / MANIFEST, signed)


def as_first_format(directory: Path) -> Path:
    """Leave of a manifest what the first format holds: no files, and no hash of its own."""
    edit_json(directory / MANIFEST, lambda values: {"format": 1, "omni_jax": "0.1.0", "leaves": values["leaves"]})
    return directory


def edit_header(path: Path, edit: Callable[[dict], dict | None]) -> None:
    """Rewrite a safetensors header, leaving the data as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    write_header(path, json.dumps(edit(header) or header).encode(), data[8 + length :])


def write_header(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def edit_tensors(directory: Path, edit: Callable[[dict], None], shard: int = 0) -> None:
    """Load a shard, let `edit` change its tensors, write it back and bring the index up to date."""
    from safetensors.numpy import load_file, save_file

    file = sorted(directory.glob("*.safetensors"))[shard]
    tensors = load_file(file)
    before = set(tensors)
    edit(tensors)
    save_file(tensors, file)

    def update(index: dict) -> None:
        for name in before - set(tensors):
            del index["weight_map"][name]
        index["weight_map"].update(dict.fromkeys(tensors, file.name))

    edit_json(directory / INDEX, update)


@pytest.fixture
def source(checkpoints, tmp_path) -> Path:
    """A private copy of the "small" checkpoint, in two shards."""
    return Path(shutil.copytree(checkpoints("small"), tmp_path / "source"))


@pytest.fixture(scope="session")
def converted(checkpoints, tmp_path_factory) -> Path:
    """The "small" checkpoint converted, for reading only."""
    directory = tmp_path_factory.mktemp("converted") / "small"
    convert_checkpoint(checkpoints("small"), directory)
    return directory
