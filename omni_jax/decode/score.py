"""How likely the model finds given tokens: log-probabilities behind whole sequences, in one forward.

Logits are made of the positions that are asked about and of no others, a block of them at a time: those of a long
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
def score(
    params: dict,
    token_ids: Array,
    position_ids: Array,
    at: Array,
    media: Media | None,
    *,
    declaration: Declaration,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability float32 [B, C] of the tokens at index `at` int32 [B, C], and whether each is the likeliest.

    token_ids: int32 [B, T], right-padded; position_ids: float32 [3, B, T]. No token is asked about at index 0.
    """
    thinker = bind(declaration, params)
    token_ids = jnp.asarray(token_ids)
    out = thinker.forward(thinker.embed_tokens(token_ids, media), jnp.asarray(position_ids), media=media)
    B, C = at.shape
    before = jnp.take_along_axis(out.hidden, jnp.asarray(at)[..., None] - 1, axis=1)
    targets = jnp.take_along_axis(token_ids, jnp.asarray(at), axis=1)

    def one(asked: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = thinker.logits(asked[0])
        chosen = logits[asked[1]]
        return chosen - jax.nn.logsumexp(logits), chosen >= jnp.max(logits)

    flat = (before.reshape(B * C, -1), targets.reshape(B * C))
    likely, best = jax.lax.map(one, flat, batch_size=BLOCK)
    return replicate(likely.reshape(B, C), declaration.mesh), replicate(best.reshape(B, C), declaration.mesh)
