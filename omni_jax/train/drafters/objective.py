"""What the loop trains for a drafter: its parameters, the frozen target, the loss of its kind, and its public files.

Online, the target's hidden states are made in the program of the loss, from text and media alike. Offline, a batch
brings them (`stored`), and of the target only embedding and head are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decode.draft.loop import features_of
from omni_jax.errors import CheckpointError, InputError
from omni_jax.inputs.values import shown
from omni_jax.models.param import Declaration
from omni_jax.omni import Omni
from omni_jax.train.drafters.batch import DraftBatch
from omni_jax.train.drafters.new import MASK, Sizes, chain_taps, new_dflash, new_eagle3, spread_layers
from omni_jax.train.drafters.vocabulary import draft_vocabulary
from omni_jax.train.losses.dflash import dflash_loss, draw_anchors
from omni_jax.train.losses.eagle3 import DECAY, STEPS, eagle3_loss
from omni_jax.train.losses.target import ends_of, hidden_states
from omni_jax.train.objective import Loss, Objective, cast, masters
from omni_jax.train.settings import check_ranges
from omni_jax.weights.drafter_files import write_drafter
from omni_jax.weights.drafters import Drafter


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """What a DFlash drafter is and how it is trained; defaults as published."""

    layers: int = 5
    """Layers of the drafter."""
    features: int = 5
    """Hidden states of the target that it reads."""
    block_size: int = 16
    """Tokens of a block: the last one that is known, and the drafts."""
    anchors: int = 512
    """Blocks of each row, drawn anew each time."""
    decay: float | None = None
    """Drafts count less the further they are from the anchor, by this many tokens; by default 7, 5 or 4 for blocks of
    16, 10 or 8."""
    expected: float | None = None
    """Weigh drafts by how many are expected to be accepted, as D-PACE does, which takes 0.5; off by default."""
    mask_token: str = MASK
    """Token that stands for what is to be drafted; one that no text holds."""

    def check(self) -> None:
        """Raise InputError for what can be of no drafter; sizes are checked with the drafter itself."""
        decay, expected = self.decay, self.expected
        check_ranges((
            ("features", self.features, self.features >= 1, "at least 1"),
            ("anchors", self.anchors, self.anchors >= 1, "at least 1"),
            ("decay", decay, decay is None or 0 < decay < inf, "a number of tokens above 0"),
            ("expected", expected, expected is None or 0 <= expected <= 1, "from 0 to 1"),
        ))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """What an EAGLE-3 drafter is and how it is trained; defaults as published."""

    draft_vocab_size: int = 32000
    """Tokens that it knows: the most frequent ones of the replies, or all that the model has."""
    unrolled: int = STEPS
    """Steps of each chain in training."""
    decay: float = DECAY
    """Weight of each step relative to the one before."""

    def check(self) -> None:
        """As `BlockSettings.check`."""
        check_ranges((
            ("draft_vocab_size", self.draft_vocab_size, self.draft_vocab_size >= 1, "at least 1"),
            ("unrolled", self.unrolled, self.unrolled >= 1, "at least 1"),
            ("decay", self.decay, 0 < self.decay < inf, "a number above 0"),
        ))  # fmt: skip


def dflash_objective(
    settings: BlockSettings, sizes: Sizes, omni: Omni, *, seed: int = 0, dtype: Any = jnp.float32, remat: bool = True
) -> Objective:
    """A new DFlash drafter for the Thinker of `omni`, over batches of `DraftBatch`.

    seed: of the parameters and the anchors. dtype: of the computation. remat: as of `dflash_loss`.

    InputError for settings that cannot be.
    """
    settings.check()
    declaration, params = _thinker(omni)
    mask, text = _mask_id(settings, omni), omni.config.thinker.text
    features = min(settings.features, text.num_layers)
    drafter = new_dflash(omni.config, mask, settings.layers, features, settings.block_size, sizes, seed)
    taps = block_states(settings, text.num_layers)
    assert taps == drafter.taps(text.num_layers)

    def loss(params: dict, frozen: dict, batch: DraftBatch) -> Loss:
        features = features_of(_states(frozen, batch, taps, declaration, dtype))
        anchors = draw_anchors(batch.text, jax.random.fold_in(jax.random.key(seed), batch.number), settings.anchors)
        return dflash_loss(
            params, features, batch.text, anchors, ends_of(frozen), declaration=drafter.declaration,
            decay=settings.decay, expected=settings.expected, remat=remat,
        )  # fmt: skip

    return _objective(drafter, drafter.params, params, loss, dtype)


def eagle3_objective(
    settings: ChainSettings,
    sizes: Sizes,
    omni: Omni,
    counts: np.ndarray,
    *,
    seed: int = 0,
    dtype: Any = jnp.float32,
    remat: bool = True,
) -> Objective:
    """A new EAGLE-3 drafter for the Thinker of `omni`, over batches of `DraftBatch`.

    counts: how often each token occurs in the replies, int [V], from `count_learned`. Others as of `dflash_objective`.
    """
    settings.check()
    declaration, params = _thinker(omni)
    text, size = omni.config.thinker.text, min(settings.draft_vocab_size, len(counts))
    offsets = draft_vocabulary(counts, size)
    drafter = new_eagle3(omni.config, offsets, ends_of(params).head, sizes, seed)
    read = chain_states(text.num_layers)
    mine = np.array([read.index(number) for number in drafter.taps(text.num_layers)])
    d2t = jnp.asarray(offsets, jnp.int32)

    def loss(params: dict, frozen: dict, batch: DraftBatch) -> Loss:
        states = _states(frozen, batch, read, declaration, dtype)
        return eagle3_loss(
            params, features_of(states[mine]), states[-1], batch.text, ends_of(frozen), d2t,
            declaration=drafter.declaration, steps=settings.unrolled, decay=settings.decay, remat=remat,
        )  # fmt: skip

    trained = {name: value for name, value in drafter.params.items() if name != "d2t"}
    return _objective(drafter, trained, params, loss, dtype)


def block_states(settings: BlockSettings, layers: int) -> tuple[int, ...]:
    """The numbers of the hidden states that a batch for DFlash brings, in order; layers: of the target."""
    return tuple(layer + 1 for layer in spread_layers(min(settings.features, layers), layers))


def chain_states(layers: int) -> tuple[int, ...]:
    """As `block_states`, for EAGLE-3: what it reads, and the last state, of which the head makes what it learns."""
    return (*(number for number in chain_taps(layers) if number != layers), layers)


def for_stored(objective: Objective) -> Objective:
    """The same objective for batches that bring their states: of the target, it holds embedding and head alone."""
    kept = {name: objective.frozen[name] for name in ("embed", "lm_head") if name in objective.frozen}
    return replace(objective, frozen=kept)


def _mask_id(settings: BlockSettings, omni: Omni) -> int:
    try:
        return omni.processor.tokenizer.token_id(settings.mask_token)
    except CheckpointError:
        remedy = f"name one of its added tokens that no text holds, such as {MASK}"
        raise InputError(f"--mask-token: the model has no token {shown(settings.mask_token)}; {remedy}") from None


def _thinker(omni: Omni) -> tuple[Declaration, dict]:
    return omni.declarations["thinker"], omni.params["thinker"]


def _states(frozen: dict, batch: DraftBatch, taps: tuple[int, ...], declaration: Declaration, dtype: Any) -> jax.Array:
    """The target's hidden states [n, B, T, D] of a batch: those that it brings, or made here."""
    if batch.states is None:
        return hidden_states(frozen, batch.text, taps, declaration=declaration).astype(dtype)
    return jnp.moveaxis(jnp.asarray(batch.states), 1, 0).astype(dtype)


def _objective(drafter: Drafter, trained: dict, frozen: dict, loss: Callable[..., Loss], dtype: Any) -> Objective:
    axes = {name: drafter.declaration.axes[name] for name in trained}
    offsets = {name: value for name, value in drafter.params.items() if name not in trained}

    def save(params: dict, directory: Path) -> None:
        write_drafter(replace(drafter, params={**offsets, **params}), directory)

    return Objective(masters(trained), cast(frozen, dtype), axes, loss, save)
