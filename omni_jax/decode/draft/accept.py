"""Which drafted tokens are accepted: the two rules that make drafting lossless.

`accept_matching` walks a chain or a tree from the current token. At each node the target draws its own token, with the
key and the position that plain decoding would use. If a draft after the node equals it, the walk goes on there;
otherwise the token ends the round. So what is emitted is what plain decoding emits, token for token, greedy or sampled,
whatever was drafted; drafts only decide how many tokens one forward gives. A draft is accepted as often as the target
draws it, which is the most that drafts chosen greedily can reach.

`accept_by_rejection` is for drafts that were drawn themselves: a draft x of probability q(x) is accepted with
min(1, p(x) / q(x)), and the first that is rejected is replaced by a draw from what p has more than q. More drafts are
accepted where the target is uncertain; the tokens follow the target's distribution and are not those of plain
decoding.

Source: the acceptance loop of z-lab's DFlash, with draws coupled to positions; "Fast Inference from Transformers via
Speculative Decoding", algorithm 1.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from omni_jax.decode.draft.tree import DraftTree
from omni_jax.decode.sampling import Plan, draw_keyed, filtered, fold
from omni_jax.decode.text import NO_TOKEN, Rows, draw, record
from omni_jax.sharding import Array

# What the two draws of a verified draft fold in, beside the row's key and the position.
ACCEPTED, INSTEAD = 2, 3


@jax.named_scope("accept")
def accept_matching(
    logits: jax.Array, drafts: DraftTree, rows: Rows, length: jax.Array, stop_ids: Array, values: dict, plan: Plan
) -> tuple[jax.Array, jax.Array, Rows]:
    """Emit the drafted tokens that the target draws too and one of its own.

    logits float32 [B, W, V]: the target's after each node. length int32 [B]: tokens before the first node. stop_ids
    int32 [m], or [B, m] of each row. Returns the tokens int32 [B, longest], -1 after the last; the node after which
    each was drawn, int32 [B, longest]; and the rows. A row that is done emits nothing; stop ids and the budget end a
    row.
    """

    def position(carry: tuple, _: None) -> tuple:
        alive, rows, node, at = carry
        here = jnp.take_along_axis(logits, node[:, None, None], axis=1)[:, 0]
        token, after = draw(here, replace(rows, done=~alive), at, stop_ids, values, plan)
        rows = replace(after, done=rows.done | (alive & after.done))
        accepted = (drafts.parent == node[:, None]) & (drafts.token_ids == token[:, None])
        alive = ~after.done & jnp.any(accepted, axis=1)
        return (alive, rows, jnp.argmax(accepted, axis=1), at + 1), (token, node)

    start = (~rows.done, rows, jnp.zeros_like(length), length + 1)
    (_, rows, *_), (tokens, path) = jax.lax.scan(position, start, None, length=drafts.longest)
    return tokens.T, path.T, rows


@jax.named_scope("accept")
def accept_by_rejection(
    logits: jax.Array, drafts: DraftTree, rows: Rows, length: jax.Array, stop_ids: Array, values: dict, plan: Plan
) -> tuple[jax.Array, jax.Array, Rows]:
    """Emit drafts of a chain by rejection sampling, and one token more.

    logits float32 [B, W, V]; other arguments and results as of `accept_matching`. A row without drafts emits the token
    of plain decoding.
    """
    assert drafts.draft_logits is not None and drafts.is_chain
    B, W, _ = logits.shape
    # After the last draft nothing was drafted: q is 0, and what p has more than q is p.
    q = jnp.pad(jax.nn.softmax(drafts.draft_logits, axis=-1), ((0, 0), (0, 1), (0, 0)))
    guesses = jnp.where(drafts.parent[:, 1:] >= 0, drafts.token_ids[:, 1:], NO_TOKEN)
    guesses = jnp.pad(guesses, ((0, 0), (0, 1)), constant_values=NO_TOKEN)
    drafting = drafts.parent[:, -1] >= 0

    def position(carry: tuple, step: tuple) -> tuple:
        alive, rows, at = carry
        logits, guess, q = step
        logits = filtered(logits, rows.seen, values, plan)
        p = jax.nn.softmax(logits, axis=-1)
        p_guess, q_guess = (jnp.take_along_axis(x, jnp.maximum(guess, 0)[:, None], axis=1)[:, 0] for x in (p, q))
        chance = jax.vmap(lambda key, at: jax.random.uniform(fold(key, at, ACCEPTED)))(rows.keys, at)
        accepted = (guess >= 0) & (chance * q_guess < p_guess)
        more = jnp.maximum(p - q, 0.0)
        # Rounding may leave nothing where p equals q.
        more = jnp.where(jnp.any(more > 0, axis=-1, keepdims=True), more, p)
        instead = jnp.where(
            drafting, draw_keyed(jnp.log(more), rows.keys, at, INSTEAD), draw_keyed(logits, rows.keys, at)
        )
        token = jnp.where(accepted, guess, instead)
        token, after = record(token, replace(rows, done=~alive), stop_ids, plan)
        rows = replace(after, done=rows.done | (alive & after.done))
        return (~after.done & accepted, rows, at + 1), token

    start = (~rows.done, rows, length + 1)
    steps = (jnp.swapaxes(logits, 0, 1), guesses.T, jnp.swapaxes(q, 0, 1))
    (_, rows, _), tokens = jax.lax.scan(position, start, steps)
    return tokens.T, jnp.broadcast_to(jnp.arange(W), (B, W)), rows
