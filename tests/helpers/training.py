"""Training batches of prepared conversations, and what transformers gives for the same tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert import load_hf
from omni_jax.inputs.batch import Batch
from omni_jax.models.param import Declaration, declare
from omni_jax.models.thinker import Thinker
from omni_jax.omni import Omni
from omni_jax.train.batch import IGNORED, MediaRows, TextBatch

# What the auxiliary loss counts: more than in the public model, so that no error in it can hide.
COEFFICIENT = 0.3


def labels_of(batch: Batch, share: float = 0.6) -> np.ndarray:
    """About `share` of a batch's tokens as labels int32 [B, T], none of padding, others IGNORED."""
    chosen = np.random.default_rng(5).random(batch.token_ids.shape) < share
    return np.where(chosen & batch.mask, batch.token_ids, IGNORED).astype(np.int32)


def text_batch(batch: Batch, labels: np.ndarray) -> TextBatch:
    """One sample in each row of a right-padded batch."""
    index = np.arange(batch.token_ids.shape[1], dtype=np.int32)
    vision = tuple((rows.patches, rows.grid) for rows in batch.vision)
    audio = None if batch.audio is None else (batch.audio.mel, batch.audio.frames, batch.audio.width)
    media = MediaRows(vision, audio, batch.visual_index, batch.audio_index) if vision or audio else None
    first_seen = np.where(batch.mask, 0, index).astype(np.int32)
    return TextBatch(batch.token_ids, labels, batch.position_ids, first_seen, media)


def pack(batch: TextBatch, lengths: list[int], length: int) -> TextBatch:
    """The rows of a batch, of `lengths` tokens each, one after the other in one row of `length` tokens."""
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])

    def joined(rows: Any, fill: int) -> np.ndarray:
        row = np.concatenate([one[..., :n] for one, n in zip(np.asarray(rows), lengths, strict=True)], axis=-1)
        pad = [(0, 0)] * (row.ndim - 1) + [(0, length - row.shape[-1])]
        return np.pad(row, pad, constant_values=fill)[..., None, :]

    seen = joined(np.asarray(batch.first_seen) + first[:, None], 0)
    seen[0, sum(lengths) :] = np.arange(sum(lengths), length)
    media = batch.media and replace(
        batch.media,
        visual_index=joined(batch.media.visual_index, -1),
        audio_index=joined(batch.media.audio_index, -1),
    )
    positions = joined(np.moveaxis(np.asarray(batch.position_ids), 1, 0), 0)
    return TextBatch(joined(batch.token_ids, 0), joined(batch.labels, IGNORED), positions, seen.astype(np.int32), media)


def declaration_of(omni: Omni, mesh: Any = None) -> Declaration:
    """The Thinker with an auxiliary loss that counts COEFFICIENT."""
    config = omni.config.thinker
    text = replace(config.text, router_aux_loss_coef=COEFFICIENT)
    return declare(Thinker, replace(config, text=text), mesh=mesh)


def reference_loss(reference: Any, inputs: dict, labels: np.ndarray) -> tuple[float, float]:
    """Loss and auxiliary loss of transformers, whose gradients stay in its parameters."""
    import torch

    thinker = reference.thinker
    thinker.zero_grad()
    thinker.router_aux_loss_coef = COEFFICIENT
    out = thinker(**inputs, labels=torch.tensor(labels).long(), output_router_logits=True)
    out.loss.backward()
    return out.loss.item(), out.aux_loss.item()


def reference_gradients(reference: Any, part: str, directory: Path) -> dict:
    """The gradients in a part of a reference as our tree: saved as if they were weights, and read back."""
    import torch

    parameters = list(getattr(reference, part).parameters())
    values = [p.data for p in parameters]
    for p in parameters:
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    try:
        reference.save_pretrained(directory)
    finally:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
    return load_hf(directory, parts=(part,))[0][part]


def each_leaf(check: Callable[[str, np.ndarray, np.ndarray], None], got: dict, want: dict) -> None:
    """Check the arrays of two trees in pairs, by path."""
    from omni_jax.weights.trees import flatten

    mine, theirs = flatten(got), flatten(want)
    assert mine.keys() == theirs.keys()
    for path, value in mine.items():
        check(path, np.asarray(value), np.asarray(theirs[path]))
