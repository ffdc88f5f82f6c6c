"""What a part of a model takes of each device's memory, and what a device has.

Computed from shapes, dtypes and logical axes, before any weight is read: weights, and the cache of a planned number of
conversations. GPUs report their memory, CPUs do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np

from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.models.param import Declaration, is_float
from omni_jax.ops.cache import CACHE_AXES, capacity_for
from omni_jax.sharding import bytes_on_a_device, round_up_rows, split_over
from omni_jax.weights.parts import declared_arrays
from omni_jax.weights.trees import flatten

# Memory planned for the cache: 8 conversations of 4096 tokens. Larger requests may run out of memory.
PLANNED_ROWS, PLANNED_TOKENS = 8, 4096
# The share of a device's memory that is left to intermediate results. On GPU the whole is JAX's pool: three quarters of
# the memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
WORKING_SHARE = 0.1
# The peak size of a cache that doubles, relative to the new cache: the old values are still there beside the new keys
# and values, the old keys are not.
GROWTH = 5 / 4


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the model as far as its place is concerned.

    declaration: the shapes and logical axes of its arrays. itemsizes: bytes of one number of each, by path. text: the
    causal stack that needs a cache; None for a part without one.
    """

    name: str
    declaration: Declaration
    itemsizes: Mapping[str, int]
    text: DecoderConfig | None

    @property
    def declared(self) -> tuple[dict, dict]:
        """Shapes and logical axes as nested dicts, as `sharding.divides` takes them."""
        return self.declaration.shapes, self.declaration.axes

    def bytes_on_a_device(self, sizes: Mapping[str, int]) -> int:
        """Bytes of weights and of the planned cache on one device of a mesh of these sizes."""
        rows = round_up_rows(PLANNED_ROWS, sizes)
        return self.weight_bytes(sizes) + self.most_cache_bytes(sizes, rows, PLANNED_TOKENS)

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
    text = {"thinker": config.thinker.text, "talker": config.talker and config.talker.text}.get(part)
    return Part(part, declaration, itemsizes, text)


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
