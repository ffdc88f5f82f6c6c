"""The Thinker's loss: cross entropy of the text, and the auxiliary loss that keeps the load on experts even.

    patches, mel -> encoders --.
    token ids -> embed ---------+-> layers -> norm -> cross entropy
                                        `-> what tokens asked of the experts -> auxiliary loss

Source: transformers `Qwen3OmniMoeThinkerForConditionalGeneration` with labels and `output_router_logits`; without the
latter the reference leaves the auxiliary loss out. Deliberate difference: sums, so that losses of several batches add.
"""

from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.models.output import ExpertLoad
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Thinker
from omni_jax.train.batch import TextBatch
from omni_jax.train.losses.cross_entropy import cross_entropy, next_labels
from omni_jax.train.media import encode
from omni_jax.train.objective import Loss, cast
from omni_jax.weights.trees import flatten, nest


def thinker_loss(
    params: dict,
    frozen: dict,
    batch: TextBatch,
    *,
    declaration: Declaration,
    dtype: Any = jnp.float32,
    remat: bool = True,
) -> Loss:
    """Loss of the Thinker on a batch, a sum over the tokens that are learned; pure, for `jit` and `grad`.

    Args:
        params: the arrays that are trained, of the Thinker's nested dict of parameters.
        frozen: its other arrays; a module can be split between the two.
        batch: rows of tokens and their media.
        declaration: of the whole Thinker, as in `Omni.declarations`.
        dtype: the type to compute in.
        remat: whether the backward pass computes layers anew instead of keeping what they made.

    Its metrics are "cross_entropy" in nats, "accuracy" (the share of tokens that are likeliest) and, for a model with
    experts, "auxiliary_loss" without its coefficient.
    """
    thinker: Thinker = bind(declaration, cast(nest({**flatten(frozen), **flatten(params)}), dtype))
    given: Any = jax.tree.map(jnp.asarray, batch)
    text = thinker.config.text
    media = None if given.media is None else encode(thinker, given.media, remat)
    x = thinker.embed_tokens(given.token_ids, media)
    counted = tokens_of_samples(given.first_seen)
    out = thinker.forward(x, given.position_ids, given.first_seen, media, counted=counted, remat=remat)
    targets = next_labels(given.labels, given.first_seen)
    tokens = cross_entropy(out.hidden, thinker.head, targets, declaration.mesh)
    total, metrics = tokens.total, {"cross_entropy": tokens.total, "accuracy": tokens.correct}
    routed = text.num_layers - len(text.dense_layers)
    if routed:
        assert out.load is not None
        auxiliary = tokens.count * load_balancing_loss(out.load, routed * jnp.sum(counted))
        total, metrics = total + text.router_aux_loss_coef * auxiliary, {**metrics, "auxiliary_loss": auxiliary}
    return Loss(total, tokens.count, metrics)


def load_balancing_loss(load: ExpertLoad, tokens: jax.Array) -> jax.Array:
    """float32 []: A where the load [L, E] is even, more where it is not; tokens: how many it sums, over all layers.

    Source: transformers `load_balancing_loss_func`, equations 4 to 6 of the Switch Transformer.
    """
    tokens = jnp.maximum(tokens, 1)
    chosen, probability = jnp.sum(load.chosen, axis=0) / tokens, jnp.sum(load.probability, axis=0) / tokens
    return load.chosen.shape[-1] * jnp.sum(jax.lax.stop_gradient(chosen) * probability)


def tokens_of_samples(first_seen: jax.Array) -> jax.Array:
    """Bool [B, T]: the tokens that are not padding, which sees itself alone and is seen by none after it."""
    index = jnp.arange(first_seen.shape[1])
    following = jnp.pad(first_seen[:, 1:], ((0, 0), (0, 1)), constant_values=len(index))
    return (first_seen < index) | (following <= index)
