"""What a part of a model takes of each device's memory, and what a device has.

Computed from shapes, dtypes and logical axes, before any weight is read: weights, and the cache of some conversations.
GPUs report their memory, CPUs do not.
"""

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.models.param import Declaration, is_float
from omni_jax.ops.cache import CACHE_AXES, capacity_for
from omni_jax.sharding import bytes_on_a_device, round_up_rows, split_over
from omni_jax.weights.parts import declare_parts, declared_arrays
from omni_jax.weights.trees import flatten


class Conversations(NamedTuple):
    """A number of conversations, and how many tokens each of them has at most."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows:,} conversation{'s' * (self.rows != 1)} of {self.tokens} tokens"


# Which meshes are chosen: those that leave room for this. What is loaded at all: what leaves room for one that is
# short. Each request plans its own caches later and is refused by itself (`decode/memory.py`).
PLANNED, LEAST = Conversations(8, 4096), Conversations(1, 1024)
# More than any machine holds.
MOST_ROWS = 1 << 40
# The share of a device's memory that is left to intermediate results. On GPU the whole is JAX's pool: three quarters of
# the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
WORKING_SHARE = 0.1
# What says how much of a GPU is JAX's, by its new name and the usual one; what it is unless said, and what is advised.
FRACTION_NAMES, FRACTION, MOST_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"), "0.75", 0.95
# The peak size of a cache that doubles, relative to the new cache: the old values are still there beside the new keys
# and values, the old keys are not.
GROWTH = 5 / 4


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the model as far as its place is concerned.

    declaration: the shapes and logical axes of its arrays. itemsizes: bytes of one number of each, by path. config: of
    the whole model.
    """

    name: str
    declaration: Declaration
    itemsizes: Mapping[str, int]
    config: OmniConfig

    @property
    def text(self) -> DecoderConfig | None:
        """The causal stack that needs a cache; None for a part without one."""
        return getattr(getattr(self.config, self.name), "text", None)

    @property
    def declared(self) -> tuple[dict, dict]:
        """Shapes and logical axes as nested dicts, as `sharding.divides` takes them."""
        return self.declaration.shapes, self.declaration.axes

    def bytes_on_a_device(self, sizes: Mapping[str, int], room: Conversations = PLANNED) -> int:
        """Bytes of weights, and of the cache for some conversations, on one device of a mesh of these sizes."""
        rows = round_up_rows(room.rows, sizes)
        return self.weight_bytes(sizes) + self.most_cache_bytes(sizes, rows, room.tokens)

    def in_bfloat16(self) -> "Part":
        """The part with no number of more than two bytes, as loading it in bfloat16 makes it."""
        return replace(self, itemsizes={path: min(size, 2) for path, size in self.itemsizes.items()})

    def in_eight_bits(self) -> "Part":
        """The part as `quantize` makes it: its routed experts in eight bits, if it has some that are not."""
        if self.text is None or self.text.int8_experts or not self.text.num_experts:
            return self
        held = replace(getattr(self.config, self.name), text=replace(self.text, int8_experts=True))
        config = replace(self.config, **{self.name: held})
        declaration = declare_parts(config, [self.name])[self.name]
        itemsizes = dict(self.itemsizes)
        for path, array in flatten(declaration.shapes, f"{self.name}/").items():
            # Scales are of the type that their weights were in.
            wide = self.itemsizes.get(path) or self.itemsizes[path.removesuffix("_scale")]
            itemsizes[path] = wide if is_float(array.dtype) else np.dtype(array.dtype).itemsize
        return Part(self.name, declaration, itemsizes, config)

    def weight_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of weights on one device of a mesh of these sizes."""
        arrays = declared_arrays(self.declaration, f"{self.name}/")
        return sum(
            bytes_on_a_device(shape, self.itemsizes[path], axes, sizes) for path, (shape, axes) in arrays.items()
        )

    def cache_bytes(self, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
        """What `cache_bytes` gives for this part, in the widest type of its weights; 0 for a part without a cache."""
        if self.text is None:
            return 0
        return cache_bytes(self.text, max(self.itemsizes.values()), sizes, rows, tokens)

    def most_cache_bytes(self, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
        """What `most_cache_bytes` gives for this part, likewise."""
        if self.text is None:
            return 0
        return most_cache_bytes(self.text, max(self.itemsizes.values()), sizes, rows, tokens)


def describe_part(
    part: str, declaration: Declaration, config: OmniConfig, types: Mapping[str, str], dtype: str | None = None
) -> Part:
    """What placing a part needs to know; its arrays are in `dtype`, or in that of `types` by path.

    Those that are declared as whole numbers keep their type.
    """
    declared = flatten(declaration.shapes, f"{part}/")
    itemsizes = {
        path: np.dtype((dtype or types[path]) if is_float(array.dtype) else array.dtype).itemsize
        for path, array in declared.items()
    }
    return Part(part, declaration, itemsizes, config)


def cache_bytes(text: DecoderConfig, itemsize: int, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
    """Bytes on one device of a cache for `rows` conversations of `tokens` tokens, in numbers of `itemsize` bytes."""
    capacity = capacity_for(min(tokens, text.max_position_embeddings))
    shape = (text.num_layers, rows, text.num_kv_heads, capacity, text.head_dim)
    over = (name for axis, size in zip(CACHE_AXES, shape, strict=True) for name in split_over(axis, size, sizes))
    return 2 * prod(shape) * itemsize // prod(sizes.get(name, 1) for name in over)


def most_cache_bytes(text: DecoderConfig, itemsize: int, sizes: Mapping[str, int], rows: int, tokens: int) -> int:
    """The same at its peak: while the cache grows to that size, and one more conversation has been prefilled.

    A single row is not split over the devices that share a batch: each holds all of it.
    """
    one = cache_bytes(text, itemsize, sizes, 1, tokens)
    return int(GROWTH * cache_bytes(text, itemsize, sizes, rows, tokens)) + one


def conversations(parts: Sequence[Part], sizes: Mapping[str, int], limit: float, tokens: int = PLANNED.tokens) -> int:
    """How many conversations of this many tokens fit beside the weights into `limit` bytes of each device of a mesh.

    They are a multiple of the devices that share rows. `MOST_ROWS` for parts without a cache.
    """
    weights, step = sum(part.weight_bytes(sizes) for part in parts), round_up_rows(1, sizes)

    def too_many(more: int) -> bool:
        return weights + sum(part.most_cache_bytes(sizes, (more + 1) * step, tokens) for part in parts) > limit

    return min(bisect_left(range(MOST_ROWS), True, key=too_many) * step, MOST_ROWS)


def room_for(parts: Sequence[Part], sizes: Mapping[str, int], limit: float) -> Conversations:
    """The conversations that fit likewise: as many as do of the planned length, or of half of it and so on."""
    tokens = PLANNED.tokens
    while not (rows := conversations(parts, sizes, limit, tokens)) and tokens > LEAST.tokens:
        tokens //= 2
    return Conversations(rows, tokens)


def memory_limit(device: Any) -> int | None:
    """Bytes that a device can hold, None where it does not report them."""
    try:
        stats = device.memory_stats()
    except (AttributeError, jax.errors.JaxRuntimeError):
        return None
    return (stats or {}).get("bytes_limit")


def usable(device: Any) -> int | None:
    """Bytes that weights and caches may take of a device, None where it does not report its memory."""
    limit = memory_limit(device)
    return None if limit is None else int(limit * (1 - WORKING_SHARE))


def fraction() -> tuple[str, float]:
    """How much of a GPU's memory is JAX's, as the environment says, and the name of the variable that says it."""
    name = next((name for name in FRACTION_NAMES if os.environ.get(name)), FRACTION_NAMES[-1])
    return name, float(os.environ.get(name) or FRACTION)


def enlargement(device: Any) -> float:
    """By how much the memory of a device would grow with `MOST_FRACTION`; 1 where it would not."""
    return max(1.0, MOST_FRACTION / fraction()[1]) if device.platform == "gpu" else 1.0
