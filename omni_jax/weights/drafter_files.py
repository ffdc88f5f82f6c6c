"""Drafters back to the files in which they are published, bit for bit.

The rows of `omni_jax.weights.draft_keymap` are followed the other way. A drafter that was loaded keeps the names,
dtypes and options that it had; one made in memory gets the layout's own names.
"""

import json
from pathlib import Path

import jax
import numpy as np

from omni_jax.draft_config import Eagle3Config
from omni_jax.sharding import on_host
from omni_jax.weights.draft_keymap import IN_DRAFT, TO_TARGET, Found, known_tokens, table
from omni_jax.weights.drafters import Drafter
from omni_jax.weights.publish import publish
from omni_jax.weights.trees import flatten

FILE = "model.safetensors"


def write_drafter(drafter: Drafter, directory: str | Path) -> int:
    """Write config.json and one safetensors file into the new `directory`; return how many tensors were written.

    Weights are in the dtype of the parameters; all processes must call this where they share them. CheckpointError when
    the directory exists.
    """
    from safetensors.numpy import save_file

    tensors = drafter_tensors(drafter)
    with publish(directory) as partial:
        if jax.process_index() == 0:
            (partial / "config.json").write_text(json.dumps(drafter.values, indent=2, ensure_ascii=False) + "\n")
            save_file(tensors, partial / FILE, metadata={"format": "pt"})
    return len(tensors)


def drafter_tensors(drafter: Drafter) -> dict[str, np.ndarray]:
    """The tensors of a drafter in their stored shapes, under the names that they had, or the layout's own."""
    arrays = {path: on_host(array) for path, array in flatten(drafter.params).items()}
    tensors = {
        name: leaf.take(arrays[leaf.path][index], place)
        for leaf in table(drafter.config, drafter.declaration)
        for index in leaf.indices()
        for name, place in leaf.placements(index)
    }
    if isinstance(drafter.config, Eagle3Config):
        tensors |= _vocabulary(drafter, arrays[TO_TARGET])
    return {_found(drafter, name).name: tensor for name, tensor in tensors.items()}


def _vocabulary(drafter: Drafter, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """`d2t` and `t2d`; only those that a loaded drafter came with."""
    assert isinstance(drafter.config, Eagle3Config)
    offsets = offsets.astype(_found(drafter, TO_TARGET).dtype)
    known = known_tokens(np.arange(len(offsets)) + offsets, drafter.config.layer.vocab_size)
    both = {TO_TARGET: offsets, IN_DRAFT: known}
    return {name: tensor for name, tensor in both.items() if name in drafter.stored or not drafter.stored}


def _found(drafter: Drafter, name: str) -> Found:
    return drafter.stored.get(name) or Found(name, np.dtype(np.int64))
