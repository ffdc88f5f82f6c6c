"""The stage export: the trained model and its drafters as everybody loads them, in the folder that the package ships.

    talker/model -> reverse conversion -> model.safetensors in bfloat16, config.json, tokenizer, template, settings
    drafters/<kind>/model -> <kind>/model.safetensors in bfloat16, <kind>/config.json
    all of it -> omni_jax/nano, which is replaced as a whole; it keeps drafters that were not trained again

Pictures and frames of videos have the same limits of size, stated where omni_jax and transformers read them:
`Qwen3OmniMoeProcessor` passes limits of its own at every call, above which it puts those of `tokenizer_config.json`
alone.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import reverse_checkpoint
from omni_jax.errors import InputError
from omni_jax.files import read_object, write_whole
from omni_jax.weights.drafter_files import write_drafter
from omni_jax.weights.drafters import check_drafter, load_drafter
from omni_jax.weights.headers import DTYPE_BITS, read_header
from omni_jax.weights.locate import DRAFTERS
from omni_jax.weights.manifest import is_converted
from omni_jax.weights.model import model_config
from scripts.nano.begin import FILE, write_tensors
from scripts.nano.config import PIXELS

DTYPE = "bfloat16"
# The most bytes of tensors.
MODEL_BYTES, DRAFTER_BYTES = 10_000_000, 1_000_000


def trained_model(output: Path) -> Path:
    """The last model that the stages trained; InputError, naming the stage to run, if there is none."""
    directory = output / "talker" / "model"
    if not is_converted(directory):
        raise InputError(f"{directory} is missing; run the stage talker first")
    return directory


def trained_drafters(output: Path) -> dict[str, Path]:
    """The directory of each kind of drafter that was trained."""
    places = {kind: output / "drafters" / kind / "model" for kind in DRAFTERS}
    return {kind: place for kind, place in places.items() if (place / "config.json").is_file()}


def shipped_drafters(package: Path) -> dict[str, Path]:
    """The directory of each kind of drafter that a package holds."""
    return {kind: package / kind for kind in DRAFTERS if (package / kind / "config.json").is_file()}


def export_nano(source: Path, drafters: dict[str, Path], package: Path) -> dict[str, int]:
    """Write a converted model, and drafters by kind, to the directory `package`: the bytes of tensors of each.

    InputError, and nothing is changed, where they are too large, do not fit each other, or would replace other files.
    """
    with replacing(package) as made:
        write_model(source, made)
        config, sizes = model_config(made), {"model": weight_bytes(made)}
        for kind, place in drafters.items():
            drafter = load_drafter(place, dtype=DTYPE)
            check_drafter(drafter, config)
            write_drafter(replace(drafter, values=in_dtype(drafter.values)), made / kind)
            sizes[kind] = weight_bytes(made / kind)
        for name, size in sizes.items():
            most = MODEL_BYTES if name == "model" else DRAFTER_BYTES
            if size > most:
                raise InputError(f"{name} has {size:,} bytes of weights, more than {most:,}; train a smaller one")
    return sizes


def write_model(source: Path, directory: Path) -> None:
    """Write a converted model to the new `directory` in bfloat16, with the limits of pictures and frames."""
    from safetensors.numpy import load_file

    reverse_checkpoint(source, directory)
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(directory / FILE).items()}
    write_tensors(directory, tensors)
    config = in_dtype(read_object(directory / "config.json"))
    config["thinker_config"] = in_dtype(config["thinker_config"])
    _write(directory / "config.json", config)
    size = {"shortest_edge": PIXELS["min_pixels"], "longest_edge": PIXELS["max_pixels"]}
    for name, changes in (("preprocessor_config.json", PIXELS), ("tokenizer_config.json", {"size": size})):
        _write(directory / name, read_object(directory / name) | changes)


def in_dtype(config: dict[str, Any]) -> dict[str, Any]:
    """A config that states bfloat16."""
    return {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": DTYPE}


def weight_bytes(directory: Path) -> int:
    """The bytes of the tensors in a directory's file of weights, without their names."""
    tensors = read_header(directory / FILE).values()
    return sum(int(np.prod(tensor.shape)) * DTYPE_BITS[tensor.dtype] // 8 for tensor in tensors)


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yield a path beside `directory` to write a new one at, which takes its name when the block succeeds.

    InputError if the old one holds what the new one lacks, except drafters.
    """
    new, old = (directory.with_name(f".{directory.name}.{word}") for word in ("new", "old"))
    directory.parent.mkdir(parents=True, exist_ok=True)
    _tidy(directory, new, old)
    try:
        yield new
        if directory.exists():
            if more := sorted({*os.listdir(directory)} - {*os.listdir(new), *DRAFTERS}):
                raise InputError(f"{directory} also holds {more[0]}, which would be lost; move it away first")
            directory.rename(old)
        new.rename(directory)
    finally:
        _tidy(directory, new, old)


def _tidy(directory: Path, new: Path, old: Path) -> None:
    """Remove what is left over; the old directory comes back if the new one has not taken its place."""
    if old.exists() and not directory.exists():
        old.rename(directory)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _write(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
