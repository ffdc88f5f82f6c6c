"""The recipes `dflash` and `eagle3`: their settings, and how settings become an objective and batches.

Published rates and schedules are the defaults. With `--states`, the target's hidden states are made once, in a first
pass over the data, and the drafter is then trained on them alone.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import OmitArgPrefixes

from omni_jax.files import user_path
from omni_jax.omni import Omni
from omni_jax.rows.files import data_files, rows_of
from omni_jax.train.batch import TextBatch
from omni_jax.train.drafters.batch import DraftBatches, LookedAhead
from omni_jax.train.drafters.check import LEAST_ACCURACY, check_target
from omni_jax.train.drafters.new import Sizes
from omni_jax.train.drafters.objective import (
    BlockSettings,
    ChainSettings,
    block_states,
    chain_states,
    dflash_objective,
    eagle3_objective,
    for_stored,
)
from omni_jax.train.drafters.stored import StoredBatches, store_states
from omni_jax.train.drafters.vocabulary import count_rows
from omni_jax.train.losses.target import hidden_states
from omni_jax.train.objective import Batches, Objective, Step
from omni_jax.train.settings import Optimizer, TextRecipe
from omni_jax.train.shown import masked_text
from omni_jax.train.text import text_batches, text_recipe

# Batches on which the target is checked before training.
CHECKED = 2


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a drafter learns from its target, and whether the target's states are kept."""

    states: Path | None = None
    """Directory for hidden states of the target, made once for all epochs; by default they are made in every step."""
    least_accuracy: float = LEAST_ACCURACY
    """Refuse data of whose replies the model itself finds a smaller share of tokens likeliest; 0 takes any."""


@dataclass(frozen=True, kw_only=True)
class DFlash(TextRecipe):
    """Train a DFlash drafter, which drafts blocks, for the Thinker as it is."""

    NAME = "dflash"
    NEXT = "--drafter {} uses it"

    optimizer: OmitArgPrefixes[Optimizer] = field(
        default_factory=lambda: Optimizer(learning_rate=6e-4, warmup_ratio=0.04, clip_norm=1.0)
    )
    drafter: OmitArgPrefixes[BlockSettings] = field(default_factory=BlockSettings)
    sizes: OmitArgPrefixes[Sizes] = field(default_factory=Sizes)
    target: OmitArgPrefixes[Target] = field(default_factory=Target)

    def objective(self, omni: Omni) -> Objective:
        """A new drafter's loss."""
        made = dflash_objective(self.drafter, self.sizes, omni, **_computed(self))
        return made if self.target.states is None else for_stored(made)

    def batches(self, omni: Omni) -> Batches:
        """The batches of the data; InputError where no row can be used, or replies are not the target's."""
        return _batches(self, self.target, omni, block_states(self.drafter, omni.config.thinker.text.num_layers))

    def shown(self, omni: Omni, step: Step) -> str:
        """A batch as text, with what is learned of it."""
        return masked_text(replace(step, batch=step.batch.text), omni.processor.tokenizer)


@dataclass(frozen=True, kw_only=True)
class Eagle3(TextRecipe):
    """Train an EAGLE-3 drafter, which drafts chains and trees, for the Thinker as it is."""

    NAME = "eagle3"
    NEXT = "--drafter {} uses it"

    optimizer: OmitArgPrefixes[Optimizer] = field(
        default_factory=lambda: Optimizer(learning_rate=1e-4, warmup_ratio=0.015, beta2=0.95, clip_norm=0.5)
    )
    drafter: OmitArgPrefixes[ChainSettings] = field(default_factory=ChainSettings)
    sizes: OmitArgPrefixes[Sizes] = field(default_factory=Sizes)
    target: OmitArgPrefixes[Target] = field(default_factory=Target)

    def objective(self, omni: Omni) -> Objective:
        """A new drafter's loss; the drafter knows the tokens that are learned most often."""
        self.drafter.check()
        made = eagle3_objective(self.drafter, self.sizes, omni, _counts(self, omni), **_computed(self))
        return made if self.target.states is None else for_stored(made)

    def batches(self, omni: Omni) -> Batches:
        """The batches of the data; InputError where no row can be used, or replies are not the target's."""
        return _batches(self, self.target, omni, chain_states(omni.config.thinker.text.num_layers))

    def shown(self, omni: Omni, step: Step) -> str:
        """A batch as text, with what is learned of it."""
        return masked_text(replace(step, batch=step.batch.text), omni.processor.tokenizer)


def _computed(recipe: TextRecipe) -> dict[str, Any]:
    """How an objective is computed."""
    compute = recipe.compute
    return {"seed": recipe.run.seed, "dtype": jnp.dtype(compute.type()), "remat": compute.remat == "layer"}


def _counts(recipe: TextRecipe, omni: Omni) -> np.ndarray:
    """How often each token of the data is learned, int64 [V]."""
    files = [file for path in recipe.run.data for file in data_files(user_path(path, "the dataset"), None)]
    rows, learned = ((folder, row) for _, folder, row in rows_of(files)), text_recipe(recipe, omni).learned
    return count_rows(rows, learned, omni.config.thinker.text.vocab_size)


def _batches(recipe: TextRecipe, target: Target, omni: Omni, taps: tuple[int, ...]) -> Batches:
    """Text as batches for drafters, after a look at what the target makes of it; with states where these are kept."""
    stores = target.states is not None and not recipe.call.dry_run
    # States are those of one epoch.
    once = replace(recipe, run=replace(recipe.run, steps=None, epochs=1)) if stores else recipe
    made, dtype = LookedAhead(text_batches(once, omni)), jnp.dtype(recipe.compute.type())
    check_target(omni, (step.batch for step in made.look(CHECKED)), target.least_accuracy)
    if target.states is None:
        return DraftBatches(made)
    if not stores:
        shape = len(taps), omni.config.thinker.text.hidden_size
        return DraftBatches(made, lambda text: _no_states(text, *shape, dtype))
    about = {"taps": taps, "dtype": dtype.name, "model": str(recipe.run.model), "data": made.state()}
    declaration, params = omni.declarations["thinker"], omni.params["thinker"]

    @jax.jit
    def states_of(params: dict, text: TextBatch) -> jax.Array:
        return hidden_states(params, text, taps, declaration=declaration).astype(dtype)

    store_states(target.states, made, about, lambda text: states_of(params, text))
    epochs = recipe.run.epochs if recipe.run.steps is None else None
    return StoredBatches(target.states, about, recipe.run.seed, epochs)


def _no_states(text: TextBatch, n: int, D: int, dtype: Any) -> np.ndarray:
    """Zeros [B, n, T, D] in the place of a batch's states, which take no memory on the host."""
    B, T = text.token_ids.shape
    return np.broadcast_to(np.zeros((), dtype), (B, n, T, D))
