"""EAGLE-3's loss: chains drafted from every token, each step compared with what the target says there.

    hidden states of the target, next tokens -> step 0 -> step 1 -> ... -> drafter's head -.
    the target's last states -> its head, restricted to the drafter's tokens -> softmax ----+-> cross entropy * 0.8^step

Later steps read the drafter's own output, as in decoding, but tokens of the data in the place of drafts. Whether a
token counts, and what the target says, is shifted by one more token with every step.

Source: EAGLE-3's training-time test and SpecForge's training of it. There each step is divided by its own number of
tokens; here all are divided by that of step 0, which differs only at the ends of replies.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import Declaration, bind, project
from omni_jax.train.batch import TextBatch
from omni_jax.train.losses.target import Ends, accepted, in_chunks, learned_ahead, places
from omni_jax.train.objective import Loss, cast

# The most logits that exist at once: 512 MiB in float32.
LOGITS = 1 << 27
STEPS, DECAY = 7, 0.8


def eagle3_loss(
    params: dict,
    features: jax.Array,
    last: jax.Array,
    batch: TextBatch,
    ends: Ends,
    d2t: jax.Array,
    *,
    declaration: Declaration,
    steps: int = STEPS,
    decay: float = DECAY,
    remat: bool = True,
) -> Loss:
    """The loss of an EAGLE-3 drafter on a batch, pure: a sum over tokens and steps of cross entropy, in nats.

    Step j has the weight decay ** j. A token does not count where the target's likeliest one is none of the drafter's.

    Args:
        params: the drafter's, of `declaration`, without d2t.
        features: the target's hidden states side by side, [B, T, n * D]; their type is that of the computation.
        last: the target's normed last states [B, T, D], which its head reads.
        batch: the rows; of their media nothing is read.
        ends: the target's embedding and head, which stay as they are.
        d2t: int32 [Vd], what to add to a draft id to get the token id.
        steps: of each chain.
        decay: of the weights from step to step.
        remat: whether the backward pass computes a step anew instead of keeping what it made.

    Metrics are means of the batch times its weight: "accepted", the tokens per round that greedy chains would give, and
    "accuracy_k", how often draft k = 1, 2, ... is the target's likeliest token.
    """
    drafter: Eagle3 = bind(declaration, {**cast(params, features.dtype), "d2t": d2t})
    B, T, _ = features.shape
    following = jnp.roll(jnp.asarray(batch.token_ids), -1, axis=1)
    embedded = drafter.embed_tokens(following, ends.embed).astype(features.dtype)
    outs = drafter.unroll(features, embedded, places(batch.first_seen), steps, remat)
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    _, asked = learned_ahead(batch, index, 2 + np.arange(steps))
    known = _shifted(_known(last, ends.head, d2t)[..., None], steps)[..., 0]
    entropy, right = _compared(drafter, outs, last, ends.head[jnp.arange(len(d2t)) + d2t])
    counted = asked & known
    total = jnp.sum(jnp.where(counted, entropy, 0) * decay ** jnp.arange(steps))
    size = jnp.sum(counted[..., 0], dtype=jnp.float32)
    accuracy, gained = accepted(right & known, asked)
    metrics = {"accepted": gained, **{f"accuracy_{j + 1}": accuracy[j] for j in range(steps)}}
    return Loss(total, size, {name: size * value for name, value in metrics.items()})


def _shifted(x: jax.Array, steps: int) -> jax.Array:
    """x [B, T, D] at the token after each and at those that follow, zero beyond the row: [B, T, steps, D]."""
    T = x.shape[1]
    longer = jnp.pad(x, ((0, 0), (0, steps), (0, 0)))
    return jnp.stack([longer[:, 1 + j : 1 + j + T] for j in range(steps)], axis=2)


def _known(last: jax.Array, head: jax.Array, d2t: jax.Array) -> jax.Array:
    """Bool [B, T]: whether the likeliest token after each is one of the drafter's."""
    V = len(head)
    known = jnp.zeros((V,), bool).at[jnp.arange(len(d2t)) + d2t].set(True)

    def some(states: jax.Array) -> jax.Array:
        return known[jnp.argmax(project(states, head.astype(states.dtype)), axis=-1)]

    return in_chunks(some, last, LOGITS // V)


def _compared(drafter: Eagle3, outs: jax.Array, last: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy [B, T, steps] of outputs [steps, B, T, D] with the target, and whether they agree.

    last: the target's states [B, T, D]. head: the rows [Vd, D] of its head that the drafter knows.
    """
    (steps, B, T, D), Vd = outs.shape, len(head)

    def some(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, state = part
        wanted, logits = project(state, head.astype(state.dtype)), drafter.logits(out)
        likely = jax.nn.softmax(wanted, axis=-1)
        entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(likely * logits, axis=-1)
        return entropy, jnp.argmax(logits, axis=-1) == jnp.argmax(wanted, axis=-1)

    states = _shifted(last, steps)
    rows = jnp.moveaxis(outs, 0, 2).reshape(B, -1, D), states.reshape(B, -1, D)
    entropy, right = in_chunks(some, rows, LOGITS // (2 * Vd))
    return entropy.reshape(B, T, steps), right.reshape(B, T, steps)
