"""DFlash's loss: at places drawn from the replies, a block of drafts is compared with the tokens that follow.

    hidden states of the target -> context ------------------.
    anchors: the token there, W - 1 masks -> blocks of all ---+-> drafter -> the target's head -> cross entropy * weight

Each block sees the context before its anchor, as when it is drafted in decoding; all blocks of a batch are one forward.
A draft counts less the further it is from its anchor, since it is of use only if those before it are accepted.

Source: "DFlash: Block Diffusion for Flash Speculative Decoding", appendix A.1, and SpecForge's training of it; D-PACE
for weights by what is accepted.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.models.dflash import DFlash
from omni_jax.models.param import Declaration, bind, project
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.losses.target import Ends, accepted, in_chunks, learned_ahead, places
from omni_jax.train.objective import Loss, cast

# The most logits that exist at once: 512 MiB in float32.
LOGITS = 1 << 27
# Published decays, in tokens, by the size of a block.
DECAYS = {8: 4.0, 10: 5.0, 16: 7.0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Anchors:
    """Tokens at which blocks begin: index int32 [B, A] in the row, rising; kept bool [B, A], whether it is one."""

    index: jax.Array
    kept: jax.Array


def decay_of(block_size: int) -> float:
    """The decay of a block, in tokens: as published for 8, 10 and 16 tokens, between them in proportion."""
    return float(np.interp(block_size, (0, *DECAYS), (0.0, *DECAYS.values())))


def draw_anchors(batch: TextBatch, key: jax.Array, most: int) -> Anchors:
    """Up to `most` different anchors of each row of a batch [B, T], drawn with a typed key [].

    Drawn are tokens that are learned and whose next one is too.
    """
    labels = jnp.asarray(batch.labels)
    B, T = labels.shape
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    _, following = learned_ahead(batch, index, np.array([1]))
    valid = (labels != IGNORED) & following[..., 0]
    # Each row by its own key: other rows change nothing.
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (T,)))(keys)
    chance, chosen = jax.lax.top_k(jnp.where(valid, drawn, -1.0), min(most, T))
    order = jnp.argsort(jnp.where(chance >= 0, chosen, T), axis=1)
    chosen, chance = (jnp.take_along_axis(x, order, axis=1) for x in (chosen, chance))
    return Anchors(chosen, chance >= 0)


def dflash_loss(
    params: dict,
    features: jax.Array,
    batch: TextBatch,
    anchors: Anchors,
    ends: Ends,
    *,
    declaration: Declaration,
    decay: float | None = None,
    expected: float | None = None,
    remat: bool = True,
) -> Loss:
    """The loss of a DFlash drafter on a batch, pure: a sum over drafts of weight times cross entropy, in nats.

    Draft k = 1, 2, ... of a block has the weight exp(-(k - 1) / decay).

    Args:
        params: the drafter's, of `declaration`.
        features: the target's hidden states side by side, [B, T, n * D]; their type is that of the computation.
        batch: the rows; of their media nothing is read.
        anchors: from `draw_anchors`.
        ends: the target's embedding and head, which the drafter shares and which stay as they are.
        decay: in tokens, by default `decay_of` the block.
        expected: weights by how many tokens are expected to be accepted instead, as D-PACE has them, with
            probabilities q of the drafts raised to (1 - expected) * q + expected.
        remat: whether the backward pass computes layers anew instead of keeping what they made.

    Metrics are means of the batch times its weight: "accepted", the tokens per round that greedy drafts would give, and
    "accuracy_k", how often draft k is right.
    """
    drafter: DFlash = bind(declaration, cast(params, features.dtype))
    config, ahead = drafter.config, np.arange(drafter.config.block_size)
    token_ids, learned = learned_ahead(batch, anchors.index, ahead)
    block = jnp.where(ahead == 0, token_ids, config.mask_token_id)
    x = ends.embed[block].astype(features.dtype)
    context, position = drafter.fuse(features), places(batch.first_seen)
    hidden = drafter.draft_blocks(x, context, anchors.index, position, remat)[:, :, 1:]
    nll, right = _compared(hidden, token_ids[:, :, 1:], ends.head)
    counted = learned[:, :, 1:] & anchors.kept[..., None]
    if expected is None:
        weight = counted * jnp.exp(-(ahead[1:] - 1) / (decay or decay_of(config.block_size)))
    else:
        weight = _expected_weights(nll, counted, expected)
    total, size = jnp.sum(weight * nll), jnp.sum(weight)
    accuracy, gained = accepted(right, counted)
    metrics = {"accepted": gained, **{f"accuracy_{k}": accuracy[k - 1] for k in ahead[1:]}}
    return Loss(total, size, {name: size * value for name, value in metrics.items()})


def _compared(hidden: jax.Array, token_ids: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy [B, ...] of normed states [B, ..., D] with token ids int32 [B, ...], and which are likeliest."""
    (V, D), shape = head.shape, token_ids.shape

    def some(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, wanted = part
        logits = project(states, head.astype(states.dtype))
        mine = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - mine, jnp.argmax(logits, axis=-1) == wanted

    nll, right = in_chunks(some, (hidden.reshape(shape[0], -1, D), token_ids.reshape(shape[0], -1)), LOGITS // V)
    return nll.reshape(shape), right.reshape(shape)


def _expected_weights(nll: jax.Array, counted: jax.Array, raised: float) -> jax.Array:
    """Weights float32 [B, A, W - 1] of drafts: the tokens that are expected to be accepted from each on.

    The probability that all drafts up to m are accepted is the product of theirs; draft j matters for all from j on.
    """
    q = jax.lax.stop_gradient(jnp.exp(-nll))
    reached = jnp.cumprod(counted * ((1 - raised) * q + raised), axis=-1)
    return counted * jnp.flip(jnp.cumsum(jnp.flip(reached, axis=-1), axis=-1), axis=-1)
