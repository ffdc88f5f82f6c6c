"""LoRA adapters from PEFT's directories: which matrices have factors, checked against a model before any is read.

    directory -> AdapterConfig, headers -> Adapter: a `Matrix` for each module of the model that is adapted -> factors

Modules go by the names that the key map has for their weights, without ".weight". PEFT writes names as they are in
memory: of the whole model or of its Thinker alone, with or without `language_model`. Experts come one by one, or, as
transformers 5 holds them, fused: of all experts at once, with gate and up in one matrix.

Source: PEFT 0.21, `lora.ParamWrapper` for the fused form.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.weights.adapter_config import CONFIG_FILE, AdapterConfig, read_adapter_config
from omni_jax.weights.headers import WEIGHT_DTYPES, Tensor, read_header
from omni_jax.weights.keymap import table
from omni_jax.weights.locate import locate
from omni_jax.weights.safetensors import SourceCheckpoint, check_inside

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# How names in memory begin, and what the key map has in their place; the first that fits is taken.
BEGINNINGS = (
    ("thinker.model.language_model.", "thinker.model."),
    ("thinker.model.visual.", "thinker.visual."),
    ("thinker.model.audio_tower.", "thinker.audio_tower."),
    ("model.language_model.", "thinker.model."),
    ("model.visual.", "thinker.visual."),
    ("model.audio_tower.", "thinker.audio_tower."),
    *((name, f"thinker.{name}") for name in ("model.", "visual.", "audio_tower.", "lm_head")),
)
OTHER_MODEL = "take the adapter that was trained for this model"
# How many names an error shows.
SHOWN = 3


@dataclass(frozen=True)
class Matrix:
    """Where the factors of one matrix are: its file's name for the module, and what their product counts.

    expert: number and count, where the tensors hold those of all experts. rows: of B, those of this matrix.
    """

    stored: str
    scale: float
    expert: tuple[int, int] | None = None
    rows: tuple[int, int | None] = (0, None)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter whose names and shapes fit a model, and none of whose factors are read; matrices: by module."""

    directory: Path
    config: AdapterConfig
    matrices: Mapping[str, Matrix]
    source: SourceCheckpoint

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold."""
        return sum(prod(tensor.shape) for tensor in self.source.tensors.values())

    @cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        """All factors as they are stored."""
        tensors = {name: self.source.read(name).astype(np.float32) for name in self.source.tensors}
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise CheckpointError(f"{self.directory}: {name!r} holds NaN or infinite values; train it again")
        return tensors

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A [r, in] and B [out, r], scale included, of an adapted module, float32."""
        matrix = self.matrices[module]
        a, b = (self._tensors[f"{PREFIX}{matrix.stored}{which}"] for which in (A, B))
        if matrix.expert is not None:
            number, count = matrix.expert
            a = a.reshape(count, -1, a.shape[1])[number]
            b = b.reshape(b.shape[0], -1, count)[slice(*matrix.rows), :, number]
        return a, b * np.float32(matrix.scale)


def open_adapter(where: str | Path, config: OmniConfig) -> Adapter:
    """The adapter of a directory in PEFT's form, for a model of this configuration.

    ConfigError for an adapter of another kind. CheckpointError for a file that is missing or damaged, for modules that
    the model does not have, factors of other shapes, and a factor without its other.
    """
    directory = locate(where, "the adapter")
    settings = read_adapter_config(directory)
    file = directory / WEIGHTS_FILE
    if not file.exists():
        pickled = (directory / "adapter_model.bin").exists()
        what = "adapter_model.bin is a pickle, which can run code; save the adapter with safetensors"
        raise CheckpointError(f"{file} is missing; {what if pickled else 'copy the whole directory'}")
    check_inside(file, directory.resolve())
    tensors = read_header(file)
    shapes = {
        name.removesuffix(".weight"): source.shape
        for leaf in table(config)
        for index in leaf.indices()
        for name, source in leaf.placements(index)
        if name.endswith(".weight") and len(source.shape) == 2
    }
    matrices = dict(_matrices(directory, settings, tensors, shapes))
    return Adapter(directory, settings, matrices, SourceCheckpoint(directory, {}, directory / CONFIG_FILE, tensors))


def _matrices(
    directory: Path, settings: AdapterConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Iterable[tuple[str, Matrix]]:
    """The adapted matrices by module; shapes: those of the model's modules."""
    unknown = []
    for stored in _modules(directory, tensors):
        a, b = (tensors[f"{PREFIX}{stored}{which}"].shape for which in (A, B))
        module = _own_name(stored)
        if module in shapes:
            rank, expected = settings.rank_of(stored), shapes[module]
            _check(directory, stored, (a, b), ((rank, expected[1]), (expected[0], rank)))
            yield module, Matrix(stored, settings.scale_of(stored))
        elif (fused := module.removesuffix(".base_layer")).endswith(".experts") and f"{fused}.0.gate_proj" in shapes:
            yield from _fused(directory, settings, stored, fused, (a, b), shapes)
        else:
            unknown.append(stored)
    if unknown:
        raise CheckpointError(
            f"{directory}: the model has no {', '.join(unknown[:SHOWN])}{_more(unknown)}; {OTHER_MODEL}"
        )


def _modules(directory: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that have both factors, by their stored names."""
    strange = [name for name in tensors if not (name.startswith(PREFIX) and name.endswith((A, B)))]
    if strange or not tensors:
        what = f"{strange[0]!r} is no factor of a linear layer" if strange else "it holds no factors"
        raise CheckpointError(f"{directory / WEIGHTS_FILE}: {what}; merge the adapter with PEFT and load the model")
    for name, tensor in tensors.items():
        other = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
        if other not in tensors:
            raise CheckpointError(f"{directory / WEIGHTS_FILE}: {other!r} is missing; copy the whole file again")
        if tensor.dtype not in WEIGHT_DTYPES or len(tensor.shape) != 2:
            raise CheckpointError(f"{directory / WEIGHTS_FILE}: {name!r} is {tensor.dtype} {list(tensor.shape)}")
    return [name.removeprefix(PREFIX).removesuffix(A) for name in tensors if name.endswith(A)]


def _own_name(stored: str) -> str:
    """A module's name in the key map."""
    for beginning, ours in BEGINNINGS:
        if stored.startswith(beginning):
            return ours + stored.removeprefix(beginning)
    return stored


def _fused(
    directory: Path,
    settings: AdapterConfig,
    stored: str,
    experts: str,
    found: tuple[tuple[int, ...], tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterable[tuple[str, Matrix]]:
    """The matrices of factors of all experts at once; which ones they are, their shapes tell."""
    count = next(e for e in itertools.count() if f"{experts}.{e}.gate_proj" not in shapes)
    inner, width = shapes[f"{experts}.0.gate_proj"]
    down = (found[0][1], found[1][0]) == (inner, width)
    name = stored.removesuffix(".base_layer") + (".down_proj" if down else ".gate_up_proj")
    rank = settings.rank_of(name)
    shape = (width, inner) if down else (2 * inner, width)
    _check(directory, stored, found, ((count * rank, shape[1]), (shape[0], count * rank)))
    parts = {"down_proj": (0, None)} if down else {"gate_proj": (0, inner), "up_proj": (inner, None)}
    for e in range(count):
        for part, rows in parts.items():
            yield f"{experts}.{e}.{part}", Matrix(stored, settings.scale_of(name), (e, count), rows)


def _check(directory: Path, stored: str, found: Any, expected: Any) -> None:
    for which, is_, wanted in zip("AB", found, expected, strict=True):
        if is_ != wanted:
            raise CheckpointError(
                f"{directory}: lora_{which} of {stored} is {list(is_)}, for this model and rank it would be "
                f"{list(wanted)}; {OTHER_MODEL}"
            )


def _more(names: list[str]) -> str:
    return f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
