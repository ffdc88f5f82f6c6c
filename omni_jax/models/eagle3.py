"""EAGLE-3: one small layer that drafts token by token, on the Thinker's hidden states first, then on its own.

    hidden states of the Thinker -> fc --+
                     own output before --+-> [norm(embedded next token), norm(h)] -> attention -> + h -> MLP -> output
                                                                                     output -> norm -> head -> draft

Step i pairs the hidden state at position i with the token at i + 1 and predicts the token at i + 2. `fc` takes only the
Thinker's states; the recursion feeds the output as it is, before the norm. The head knows a part of the vocabulary, the
most frequent tokens, and `to_target` translates.

Chain and tree are the same step: without a mask the T inputs follow each other after what the cache holds; with one
they are nodes of a tree, each seeing its ancestors. Nodes are written into the slots after the row; setting the
cache's length back forgets them.

In training the chains from all places of a row are drafted at once, a step at a time (`unroll`).

Source: EAGLE `cnets.Model` (LlamaDecoderLayeremb). There later nodes are appended to copies of the keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.draft_config import Eagle3Config
from omni_jax.models.feed_forward import MLP
from omni_jax.models.param import Linear, Module, RMSNorm, param, project
from omni_jax.ops.attention import attend, causal_attention
from omni_jax.ops.branches import attend_branches
from omni_jax.ops.cache import KVCache
from omni_jax.ops.rope import rope, rotate


class Midlayer(Module):
    """The one layer: attention over [token, hidden state], qkv [K, G + 2, H, 2 * D], then a gated MLP."""

    def __init__(self, rngs: nnx.Rngs, config: Eagle3Config):
        c = config.layer
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.config = c
        self.input_norm = RMSNorm(rngs, D, c.rms_norm_eps)
        self.hidden_norm = RMSNorm(rngs, D, c.rms_norm_eps)
        self.qkv = param(
            rngs, (K, N // K + 2, H, 2 * D), ("kv_heads", None, "head_dim", "embed"), scale=(2 * D) ** -0.5
        )
        self.out = param(rngs, (D, N, H), ("embed", "heads", "head_dim"), scale=(N * H) ** -0.5)
        self.mlp_norm = RMSNorm(rngs, D, c.rms_norm_eps)
        self.mlp = MLP(rngs, D, c.intermediate_size, layers=1)

    def __call__(
        self, h: jax.Array, embedded: jax.Array, position: jax.Array, cache: KVCache, mask: jax.Array | None
    ) -> tuple[jax.Array, KVCache]:
        """As `Eagle3.extend`, [B, T, D] -> [B, T, D], without counting what is written."""
        q, k, v = self.queries_keys_values(h, embedded, position)
        cache = cache.write(0, k, v)
        if mask is None:
            attended = causal_attention(q, cache.k[0], cache.v[0], cache.length)
        else:
            attended = attend(q, cache.k[0], cache.v[0], mask)
        return self.outputs(h, attended), cache

    def queries_keys_values(
        self, h: jax.Array, embedded: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of h and embedded [B, T, D] at positions [B, T]: queries [B, T, K, G, H], keys and values [B, T, K, H]."""
        c = self.config
        x = jnp.concatenate([self.input_norm(embedded), self.hidden_norm(h)], axis=-1)
        qkv = project(x, self.qkv[...]).astype(h.dtype)
        rotation = rope(position.astype(jnp.float32), c.head_dim, c.rope, h.dtype)
        return rotate(qkv[:, :, :, :-2], *rotation), rotate(qkv[:, :, :, -2], *rotation), qkv[:, :, :, -1]

    def outputs(self, h: jax.Array, attended: jax.Array) -> jax.Array:
        """h [B, T, D] and what its queries attended to [B, T, K, G, H] -> outputs [B, T, D]."""
        c = self.config
        attended = attended.reshape(*h.shape[:2], c.num_heads, c.head_dim)
        h = h + project(attended, self.out[...], contracted=2).astype(h.dtype)
        return h + self.mlp(self.mlp_norm(h), 0)


class Eagle3(Module):
    """fc [D, n * D] for n hidden states, the layer, norm and head [Vd, D], d2t int32 [Vd]; embed [V, D] where owned.

    d2t: what to add to a draft id to get the token id.
    """

    def __init__(self, rngs: nnx.Rngs, config: Eagle3Config, own_embedding: bool):
        c = config.layer
        D, Vd = c.hidden_size, config.draft_vocab_size
        self.config = config
        self.embed = param(rngs, (c.vocab_size, D), ("vocab", "embed"), scale=1.0) if own_embedding else None
        self.fc = Linear(rngs, (D, config.features * D), ("embed", None), bias=False)
        self.midlayer = Midlayer(rngs, config)
        self.norm = RMSNorm(rngs, D, c.rms_norm_eps)
        self.lm_head = param(rngs, (Vd, D), ("vocab", "embed"), scale=D**-0.5)
        self.d2t = nnx.Param(jnp.zeros((Vd,), jnp.int32), axes=("vocab",))

    def empty(self, rows: int, capacity: int, dtype: Any) -> KVCache:
        """A cache [1, rows, K, capacity, H] that holds nothing yet."""
        c = self.config.layer
        return KVCache.empty(1, rows, c.num_kv_heads, capacity, c.head_dim, dtype)

    def embed_tokens(self, token_ids: jax.Array, target_embed: jax.Array) -> jax.Array:
        """Token ids int32 [...] -> [..., D] by the drafter's own table, or by the Thinker's [V, D] if it has none."""
        table = target_embed if self.embed is None else self.embed[...]
        return table[token_ids]

    @jax.named_scope("fuse")
    def fuse(self, features: jax.Array) -> jax.Array:
        """Hidden states of the Thinker side by side, in the order of the taps, [B, T, n * D] -> [B, T, D]."""
        return self.fc(features)

    @jax.named_scope("draft")
    def extend(
        self,
        h: jax.Array,
        embedded: jax.Array,
        cache: KVCache,
        count: jax.Array | None = None,
        position: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states h [B, T, D] with the embeddings [B, T, D] of the tokens after them -> outputs, and the cache.

        Keys and values are written into the T slots after what each row holds. count: int32 [B], how many of the T are
        real and counted as held, all by default. position: int32 [B, T], by default the slot's index. mask: bool
        [B, T, S], the slots that each input sees, itself included; by default all up to its own.
        """
        if position is None:
            position = cache.length[:, None] + jnp.arange(h.shape[1])
        out, cache = self.midlayer(h, embedded, position, cache, mask)
        return out, cache.advance(h.shape[1] if count is None else count)

    @jax.named_scope("unroll")
    def unroll(
        self, features: jax.Array, embedded: jax.Array, position: jax.Array, steps: int, remat: bool = False
    ) -> jax.Array:
        """Whole rows, from each of whose tokens a chain of `steps` steps is drafted: outputs [steps, B, T, D].

        Step j at token i reads the output of step j - 1 there and the embedding of token i + 1 + j, in the place of the
        draft; it sees the first inputs of its sample up to token i, and its own chain. features: [B, T, n * D], for
        `fuse`. embedded: [B, T, D], of the token after each. position: int32 [B, T], the index of each token in its
        sample. remat: whether a backward pass computes a step anew instead of keeping what it made.
        """
        index = jnp.arange(position.shape[1])
        first, stop = (index - position)[..., None], jnp.broadcast_to(index + 1, position.shape)

        def step(h: jax.Array, embedded: jax.Array, place: jax.Array, before: tuple) -> tuple[jax.Array, tuple]:
            q, k, v = self.midlayer.queries_keys_values(h, embedded, place)
            steps = (*before, (k, v))
            row_k, row_v = (x.swapaxes(1, 2) for x in steps[0])
            own_k, own_v = (jnp.stack(x, axis=2)[:, :, 1:] for x in zip(*steps, strict=True))
            seen = jnp.ones((1, len(before)), bool)
            attended = attend_branches(q[:, :, None], (row_k, row_v), (own_k, own_v), first, stop, seen)
            return self.midlayer.outputs(h, attended[:, :, 0]), steps

        run = jax.checkpoint(step) if remat else step
        h, made, outs = self.fuse(features), (), []
        for j in range(steps):
            following = jnp.pad(embedded, ((0, 0), (0, j), (0, 0)))[:, j:]
            h, made = run(h, following, position + j, made)
            outs.append(h)
        return jnp.stack(outs)

    @jax.named_scope("draft_logits")
    def logits(self, out: jax.Array) -> jax.Array:
        """Outputs of `extend` [..., D] -> float32 logits [..., Vd] over the draft vocabulary."""
        return project(self.norm(out), self.lm_head[...])

    def to_target(self, draft_ids: jax.Array) -> jax.Array:
        """Ids of the draft vocabulary int32 [...] -> token ids int32 [...]."""
        return draft_ids + self.d2t[...][draft_ids].astype(jnp.int32)
