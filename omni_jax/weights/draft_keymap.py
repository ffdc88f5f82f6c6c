"""The key map of drafters: the names under which DFlash and EAGLE-3 are published, and where their tensors go.

Written with the same rows as the model's (`keymap`). Checkpoints put a "model." before any name or leave it out, and
call the layer of EAGLE-3 `midlayer` or `layers.0`; `own_names` undoes that. EAGLE-3 also stores which tokens of the
model it knows, twice: `d2t`, what to add to a draft id to get the token id, and `t2d`, whether a token is known.
"""

from dataclasses import dataclass, replace
from typing import assert_never

import numpy as np

from omni_jax.decoder_config import DecoderConfig
from omni_jax.draft_config import DFlashConfig, Eagle3Config
from omni_jax.errors import CheckpointError
from omni_jax.models.param import Declaration
from omni_jax.weights.headers import NUMPY_DTYPES
from omni_jax.weights.keymap import attention, decoder, mlp
from omni_jax.weights.layout import Leaf, Scope, Stack
from omni_jax.weights.parts import declared_arrays
from omni_jax.weights.safetensors import SourceCheckpoint

PREFIX, LAYER, LAYER_ALIAS = "model.", "midlayer.", "layers.0."
EMBED, TO_TARGET, IN_DRAFT = "embed_tokens.weight", "d2t", "t2d"

DraftConfig = DFlashConfig | Eagle3Config


@dataclass(frozen=True)
class Found:
    """A tensor as it was found on disk: its name, and its dtype."""

    name: str
    dtype: np.dtype


def table(config: DraftConfig, declaration: Declaration) -> list[Leaf]:
    """All weights of a drafter, with the shapes and axes that its module declares; d2t and t2d are handled apart."""
    root = Scope(declared_arrays(declaration))
    ends = [root.leaf("fc/weight", "fc.weight"), root.leaf("norm/weight", "norm.weight")]
    match config:
        case DFlashConfig(layers=layers):
            return [root.leaf("hidden_norm/weight", "hidden_norm.weight"), *decoder(layers, root), *ends]
        case Eagle3Config(layer=layer):
            return [*_eagle3(layer, root), *ends]
        case _:
            assert_never(config)


def _eagle3(layer: DecoderConfig, root: Scope) -> list[Leaf]:
    s = root.under(LAYER, "midlayer/")
    rows = [
        root.leaf("lm_head", "lm_head.weight"),
        *attention(layer, s),
        *mlp(s.under("mlp.", "mlp/", Stack("l"))),
        s.leaf("mlp_norm/weight", "post_attention_layernorm.weight"),
        s.leaf("input_norm/weight", "input_layernorm.weight"),
        s.leaf("hidden_norm/weight", "hidden_norm.weight"),
    ]
    return [*rows, *([root.leaf("embed", EMBED)] if "embed" in root.arrays else [])]


def own_names(source: SourceCheckpoint, config: DraftConfig) -> tuple[SourceCheckpoint, dict[str, Found]]:
    """The same checkpoint with its tensors under the layout's own names, and by these names how each was found."""
    tensors, found = {}, {}
    for name, tensor in source.tensors.items():
        own = name.removeprefix(PREFIX)
        if isinstance(config, Eagle3Config) and own.startswith(LAYER_ALIAS):
            own = LAYER + own.removeprefix(LAYER_ALIAS)
        if own in tensors:
            raise CheckpointError(f"{source.directory}: {found[own].name!r} and {name!r} are two names of one tensor")
        tensors[own], found[own] = tensor, Found(name, NUMPY_DTYPES.get(tensor.dtype, np.dtype(np.uint8)))
    return replace(source, tensors=tensors), found


def read_vocabulary(source: SourceCheckpoint, config: Eagle3Config) -> tuple[SourceCheckpoint, np.ndarray]:
    """The checkpoint without `d2t` and `t2d`, and the offsets int32 [Vd] of the former: zeros for the whole vocabulary.

    CheckpointError where they are missing, lead outside the vocabulary or contradict each other.
    """
    V, Vd, where = config.layer.vocab_size, config.draft_vocab_size, source.directory
    tensors = dict(source.tensors)
    stated, known = tensors.pop(TO_TARGET, None), tensors.pop(IN_DRAFT, None)
    if stated is None and Vd < V:
        raise CheckpointError(
            f"{where}: {TO_TARGET!r} is missing, but the drafter knows only {Vd:,} of {V:,} tokens; without it "
            "its drafts have no token ids: download the drafter completely"
        )
    if stated and (stated.shape != (Vd,) or stated.dtype not in ("I32", "I64")):
        raise CheckpointError(f"{where}: {TO_TARGET!r} is {stated.dtype} {list(stated.shape)}, not integer [{Vd}]")
    offsets = np.zeros((Vd,), np.int64) if stated is None else source.read(TO_TARGET).astype(np.int64)
    targets = np.arange(Vd) + offsets
    if targets.min() < 0 or targets.max() >= V or len(np.unique(targets)) < Vd:
        raise CheckpointError(f"{where}: {TO_TARGET!r} does not lead to {Vd:,} different tokens of {V:,}")
    if known and not ((known.shape, known.dtype) == ((V,), "BOOL") and _equal(source, targets, V)):
        raise CheckpointError(f"{where}: {TO_TARGET!r} and {IN_DRAFT!r} name different tokens; download them again")
    return replace(source, tensors=tensors), offsets.astype(np.int32)


def known_tokens(targets: np.ndarray, vocab_size: int) -> np.ndarray:
    """`t2d`, bool [V]: the tokens that a draft vocabulary of these token ids, integers [Vd], knows."""
    known = np.zeros((vocab_size,), bool)
    known[targets] = True
    return known


def _equal(source: SourceCheckpoint, targets: np.ndarray, vocab_size: int) -> bool:
    """Whether the stored `t2d`, bool [V], marks the tokens with these ids, integers [Vd]."""
    return np.array_equal(source.read(IN_DRAFT), known_tokens(targets, vocab_size))
