"""Which drafted tokens stand: the rule that makes drafting lossless.

The target's logits of a block are walked from the first position on, and at each one the target draws its own token,
with the key and the position that plain decoding would use. A draft that equals it has been verified, and the walk
goes on; the first that differs is replaced by it and ends the block. So what is emitted is what plain decoding emits,
token for token, greedy or sampled, whatever was drafted; drafts only decide how many tokens one forward gives.

Source: the acceptance loop of z-lab's DFlash, with draws coupled to positions.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from omni_jax.decode.generate import NO_TOKEN, Array, Rows, draw
from omni_jax.decode.sampling import Plan


def accept(
    logits: jax.Array, drafts: jax.Array, rows: Rows, length: jax.Array, stop_ids: Array, values: dict, plan: Plan
) -> tuple[jax.Array, Rows]:
    """Emit the drafted tokens that the target confirms and one of its own: int32 [B, W], -1 behind them, and the rows.

    logits float32 [B, W, V]: the target's, for the token at hand and the drafts int32 [B, W - 1] behind it.
    length int32 [B]: tokens before these. A row that is done emits nothing; stop ids and the budget end a row.
    """
    guesses = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=NO_TOKEN)

    def position(carry: tuple, step: tuple) -> tuple:
        alive, rows, at = carry
        logits, guess = step
        token, after = draw(logits, replace(rows, done=~alive), at, stop_ids, values, plan)
        rows = replace(after, done=rows.done | (alive & after.done))
        return (~after.done & (token == guess), rows, at + 1), token

    start = (~rows.done, rows, length + 1)
    (_, rows, _), tokens = jax.lax.scan(position, start, (jnp.swapaxes(logits, 0, 1), guesses.T))
    return tokens.T, rows
