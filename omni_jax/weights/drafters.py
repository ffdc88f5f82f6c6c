"""Drafters from the directories in which they are published, and whether one fits a model.

    where -> headers -> table (`draft_keymap`) -> Drafter (configuration, declaration, parameters) -> check_drafter

Located, read and checked as models are. Names are remembered as they were found, so that the way back gives the same
tensors. A drafter decides how fast a reply comes (`decode.draft.engine` names the exceptions). Still, nothing is
guessed or left out: every tensor has a place and every place is filled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import jax.numpy as jnp
from jax.sharding import Mesh

from omni_jax import sharding
from omni_jax.config import OmniConfig
from omni_jax.draft_config import DFlashConfig, Eagle3Config, read_draft_config
from omni_jax.errors import InputError
from omni_jax.models.dflash import DFlash
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import Declaration, bind, declare
from omni_jax.weights.draft_keymap import EMBED, TO_TARGET, DraftConfig, Found, own_names, read_vocabulary, table
from omni_jax.weights.leaves import read_leaves
from omni_jax.weights.locate import locate
from omni_jax.weights.match import check_tensors, with_dtypes
from omni_jax.weights.parts import DTYPES
from omni_jax.weights.safetensors import open_checkpoint
from omni_jax.weights.trees import flatten, nest

UNKNOWN = "perhaps those of an option that is not implemented"


@dataclass(frozen=True, eq=False)
class Drafter:
    """A loaded drafter.

    kind: "dflash" or "eagle3". declaration, params: for `bind`, as those of the model's parts. values: its config.json.
    stored: by the layout's own name, how each tensor was found; empty for a drafter that comes from no files.
    """

    kind: str
    config: DraftConfig
    declaration: Declaration
    params: dict
    values: dict[str, Any]
    stored: Mapping[str, Found]

    @property
    def module(self) -> DFlash | Eagle3:
        """The drafter as an NNX module with its parameters in place."""
        return bind(self.declaration, self.params)

    def placed(self, mesh: Mesh | None) -> "Drafter":
        """The same drafter laid over `mesh`, replicated where the mesh does not divide it; itself without a mesh."""
        if mesh is None:
            return self
        axes = flatten(self.declaration.axes)
        params = {path: sharding.place(x, axes[path], mesh) for path, x in flatten(self.params).items()}
        return replace(self, declaration=replace(self.declaration, mesh=mesh), params=nest(params))

    def taps(self, target_layers: int) -> tuple[int, ...]:
        """The hidden states that it reads of a Thinker of `target_layers` layers, by the numbers of `Thinker.extend`.

        Their order is that in which `fuse` wants them side by side.
        """
        return self.config.taps(target_layers)


def load_drafter(where: str | Path, dtype: str | None = None) -> Drafter:
    """Load a DFlash or EAGLE-3 drafter from its public safetensors files.

    Args:
        where: its directory, a snapshot folder of the hub's cache, a model id, which needs omni_jax[hub], or
            "nano/dflash" or "nano/eagle3", which the package holds.
        dtype: "float32" or "bfloat16"; by default as stored.

    ConfigError or CheckpointError, naming the key, tensor or file and the remedy, for anything that is not complete.
    """
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype {dtype!r}; choose from {list(DTYPES)}")
    source = open_checkpoint(locate(where, "the drafter"))
    config = read_draft_config(source.config, str(source.config_file))
    source, stored = own_names(source, config)
    others: dict[str, Any] = {}
    if isinstance(config, Eagle3Config):
        source, offsets = read_vocabulary(source, config)
        others[TO_TARGET] = jnp.asarray(offsets)
    kind, declaration = declare_drafter(config, own_embedding=EMBED in source.tensors)
    rows = table(config, declaration)
    check_tensors(source, rows, rows, lambda name: UNKNOWN)
    arrays = read_leaves(source, with_dtypes(source, rows, dtype))
    return Drafter(kind, config, declaration, nest({**arrays, **others}), source.config, stored)


def declare_drafter(config: DraftConfig, own_embedding: bool = False) -> tuple[str, Declaration]:
    """The kind of drafter that a configuration describes, and its declaration."""
    match config:
        case DFlashConfig():
            return "dflash", declare(DFlash, config)
        case Eagle3Config():
            return "eagle3", declare(Eagle3, config, own_embedding)
        case _:
            assert_never(config)


def check_drafter(drafter: Drafter, config: OmniConfig) -> None:
    """Raise InputError, naming what differs, unless the drafter can draft for the Thinker of `config`."""
    text = config.thinker.text
    match drafter.config:
        case DFlashConfig(layers=own) | Eagle3Config(layer=own):
            pass
        case _:
            assert_never(drafter.config)
    remedy = "; take the drafter that was trained for this model"
    for what, mine, its in (
        ("width", own.hidden_size, text.hidden_size),
        ("vocabulary", own.vocab_size, text.vocab_size),
    ):
        if mine != its:
            raise InputError(f"the drafter's {what} is {mine:,}, the model's {its:,}{remedy}")
    stated = getattr(drafter.config, "num_target_layers", None)
    if stated not in (None, text.num_layers):
        raise InputError(f"the drafter reads a model of {stated} layers, this one has {text.num_layers}{remedy}")
    taps = drafter.taps(text.num_layers)
    if min(taps) < 0 or max(taps) > text.num_layers or len(set(taps)) < len(taps):
        raise InputError(
            f"the drafter reads the hidden states {list(taps)}, this model has {text.num_layers} after its input; "
            "correct the layer ids in the drafter's config.json, or take the drafter that was trained for this model"
        )
    if isinstance(drafter.config, DFlashConfig):
        _check_mask(drafter.config.mask_token_id, config)


def _check_mask(mask: int, config: OmniConfig) -> None:
    """A mask token that means something to the model would be drafted with that meaning, or collide with media."""
    thinker = config.thinker
    if not 0 <= mask < thinker.text.vocab_size:
        raise InputError(f"the drafter's mask_token_id {mask} is outside the vocabulary of {thinker.text.vocab_size:,}")
    taken = {name.removesuffix("_token_id"): value for name, value in config.token_ids.items()}
    # No file states the tokens that close a medium; in the vocabulary they follow those that open it.
    taken |= {f"{name}_end": taken[f"{name}_start"] + 1 for name in ("vision", "audio")}
    for name, value in taken.items():
        if mask == value:
            raise InputError(
                f"the drafter's mask_token_id {mask} is this model's {name} token; the drafter was made for a text "
                "model with other tokens: take one that was trained for this model"
            )
