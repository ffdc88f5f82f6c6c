"""Whether data and head are the target's, before a drafter is trained on them.

A drafter learns what the target says. Replies of another model, or a wrong head, would show only when it is used.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from omni_jax.errors import InputError
from omni_jax.models.param import Declaration, bind, project
from omni_jax.models.thinker import Thinker
from omni_jax.omni import Omni
from omni_jax.train.batch import TextBatch
from omni_jax.train.losses.target import ends_of, hidden_states, in_chunks, learned_ahead

# Below this share of right next tokens, replies are probably not the target's own.
LEAST_ACCURACY = 0.4
# The most logits that exist at once.
LOGITS = 1 << 26


def check_target(omni: Omni, batches: Iterable[TextBatch], least: float = LEAST_ACCURACY) -> float:
    """The share of learned tokens that the Thinker itself thinks likeliest, of a few batches.

    InputError if it is less than `least`, or if no token is learned.
    """
    declaration, params = omni.declarations["thinker"], omni.params["thinker"]
    right = asked = 0
    for batch in batches:
        some = _right(params, batch, declaration=declaration)
        right, asked = right + int(some[0]), asked + int(some[1])
    if not asked:
        raise InputError("no token of the data is learned; give data with replies of the assistant")
    if right < least * asked:
        raise InputError(
            f"the model itself finds {right / asked:.0%} of the replies' tokens likeliest, less than {least:.0%}: a "
            "drafter must learn what the model says; have it answer the prompts first: omni-jax train regenerate"
        )
    return right / asked


@partial(jax.jit, static_argnames="declaration")
def _right(params: dict, batch: TextBatch, *, declaration: Declaration) -> tuple[jax.Array, jax.Array]:
    """How many learned tokens are the likeliest after those before them, and how many there are, int32 []."""
    thinker: Thinker = bind(declaration, params)
    head = ends_of(params).head
    states = hidden_states(params, batch, (thinker.config.text.num_layers,), declaration=declaration)[0]
    B, T, _ = states.shape

    def likeliest(some: jax.Array) -> jax.Array:
        return jnp.argmax(project(some, head), axis=-1)

    said = in_chunks(likeliest, states, LOGITS // len(head))[..., None]
    token_ids, learned = learned_ahead(batch, jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.array([1]))
    return jnp.sum(learned & (said == token_ids)), jnp.sum(learned)
