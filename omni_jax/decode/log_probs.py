"""How likely the model finds given tokens: their log-probabilities within whole sequences, in one forward.

Logits are made at the positions of these tokens and at no others, a block of positions at a time: the logits of a long
sequence over the whole vocabulary would need more memory than the model.
"""

from functools import partial

import jax
import jax.numpy as jnp

from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Media
from omni_jax.sharding import Array, replicate

# Positions whose logits exist at the same time, over all rows.
BLOCK = 256


@partial(jax.jit, static_argnames="declaration")
def token_log_probs(
    params: dict,
    token_ids: Array,
    position_ids: Array,
    at: Array,
    media: Media | None,
    *,
    declaration: Declaration,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability float32 [B, C] of the tokens at index `at` int32 [B, C], and bool [B, C] whether none is higher.

    token_ids: int32 [B, T], right-padded; position_ids: float32 [3, B, T]. No index is 0: nothing predicts that token.
    """
    thinker = bind(declaration, params)
    token_ids = jnp.asarray(token_ids)
    out = thinker.forward(thinker.embed_tokens(token_ids, media), jnp.asarray(position_ids), media=media)
    B, C = at.shape
    before = jnp.take_along_axis(out.hidden, jnp.asarray(at)[..., None] - 1, axis=1)
    targets = jnp.take_along_axis(token_ids, jnp.asarray(at), axis=1)

    def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, target = row
        logits = thinker.logits(hidden)
        chosen = logits[target]
        return chosen - jax.nn.logsumexp(logits), chosen >= jnp.max(logits)

    flat = (before.reshape(B * C, -1), targets.reshape(B * C))
    likely, best = jax.lax.map(one, flat, batch_size=BLOCK)
    return replicate(likely.reshape(B, C), declaration.mesh), replicate(best.reshape(B, C), declaration.mesh)
