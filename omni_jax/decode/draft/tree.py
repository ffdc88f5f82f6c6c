"""What a drafter proposes, a chain of tokens or a tree of them, and how it chooses each."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from omni_jax.decode.sampling import Plan, draw_keyed, filtered

# What a draft's draw folds in besides its row's key and its position; the target's own draws fold in nothing more.
DRAFT = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftTree:
    """Tokens for one forward of the Thinker, the current one first.

    token_ids int32 [B, W]. parent int32 [B, W]: the node that each follows, which comes before it; -1 for the first.
    draft_logits float32 [B, W - 1, V]: what each draft was drawn from, unnormalised; None where none was drawn.
    longest: the most nodes on a path. is_chain: whether each node follows the one before it.
    """

    token_ids: jax.Array
    parent: jax.Array
    draft_logits: jax.Array | None = None
    longest: int = field(default=1, metadata={"static": True})
    is_chain: bool = field(default=False, metadata={"static": True})

    @classmethod
    def chain(cls, token: jax.Array, drafts: jax.Array, draft_logits: jax.Array | None = None) -> "DraftTree":
        """Drafts int32 [B, W - 1], one after the other, after the current token int32 [B].

        draft_logits float32 [B, W - 1, V]: what they were drawn from, if they were.
        """
        token_ids = jnp.concatenate([token[:, None], drafts], axis=1)
        parent = jnp.broadcast_to(jnp.arange(-1, token_ids.shape[1] - 1), token_ids.shape)
        return cls(token_ids, parent, draft_logits, longest=token_ids.shape[1], is_chain=True)

    def only(self, rows: jax.Array) -> "DraftTree":
        """The same for `rows` bool [B]; in others no node follows another, so that nothing can be accepted."""
        return replace(self, parent=jnp.where(rows[:, None], self.parent, -1))

    def ancestors(self) -> jax.Array:
        """Bool [B, W, W]: which nodes are on the path to each, itself included."""
        W = self.token_ids.shape[1]
        reach = (self.parent[..., None] == jnp.arange(W)) | jnp.eye(W, dtype=bool)
        steps = 1
        while steps < self.longest - 1:
            further = reach.astype(jnp.float32)
            reach, steps = further @ further > 0, 2 * steps
        return reach


@dataclass(frozen=True)
class DraftSampler:
    """How drafts are chosen: the likeliest with a greedy plan, else drawn as the request's settings say.

    keys: one per row. position int32 [B]: of the first draft.
    """

    keys: jax.Array
    position: jax.Array
    values: dict
    plan: Plan

    def __call__(self, logits: jax.Array, step: jax.Array | int) -> tuple[jax.Array, jax.Array | None]:
        """Draft number `step` int32 [B] from logits [B, V], and the logits [B, V] that it was drawn from, if any."""
        if self.plan.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
        logits = filtered(logits, None, self.values, self.plan)
        return draw_keyed(logits, self.keys, self.position + step, DRAFT), logits
