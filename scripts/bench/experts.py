"""Count the distinct experts that rounds of drafting use: the weights of each are read once per round."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.decode.draft.engine import SpeculativeEngine
from omni_jax.decode.draft.loop import SpeculativeState
from omni_jax.decode.draft.tree import DraftSampler
from omni_jax.decode.limits import Limits
from omni_jax.decode.request import requests_for
from omni_jax.decode.sampling import Plan
from omni_jax.inputs.batch import Batch
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.param import Declaration, bind
from omni_jax.models.thinker import Thinker
from omni_jax.ops.attention import attend, tree_mask
from omni_jax.ops.moe import route
from omni_jax.ops.rope import rope

# Rounds in which experts are counted.
COUNTED_ROUNDS = 8


def count_experts(engine: SpeculativeEngine, batch: Batch, limits: Limits) -> list[np.ndarray]:
    """Distinct experts of every layer that each of a batch's first rounds verifies with, all rows: int [layers]."""
    state = engine.prefill(batch, requests_for(batch, limits, [0] * len(batch.token_ids))).state
    length, counted = engine.lengths[0], []
    for _ in range(COUNTED_ROUNDS):
        used = experts_used(engine.params, state, engine.proposer, engine.target.declaration, length)
        counted.append(np.asarray(used))
        _, state = engine.dispatch(state, engine.plan_of(length, 1))
        if bool(jnp.all(state.decode.rows.done)):
            break
    return counted


@partial(jax.jit, static_argnums=(2, 3, 4))
def experts_used(
    params: tuple[dict, Any], state: SpeculativeState, proposer: Any, declaration: Declaration, verify_tokens: int
) -> jax.Array:
    """Distinct experts of every layer of experts, int32 [layers], if `state` continued with a greedy round.

    params: the Thinker's and the drafter's. verify_tokens: of that round.
    """
    thinker, decode = bind(declaration, params[0]), state.decode
    choose = DraftSampler(decode.rows.keys, decode.cache.length + 1, {}, Plan(True, False, 0))
    drafts, _ = proposer.propose(params[1], thinker, state.memory, decode.rows.token, verify_tokens, choose)
    ancestors = drafts.ancestors()
    position = decode.positions(jnp.sum(ancestors, axis=2) - 1)
    mask = tree_mask(decode.cache.length, ancestors, decode.cache.k.shape[3])
    ids = chosen_experts(thinker, thinker.embed_tokens(drafts.token_ids), position, decode.cache, mask)
    used = jnp.any(ids[..., None] == jnp.arange(thinker.layers.config.num_experts), axis=(1, 2))
    return jnp.sum(used, axis=1, dtype=jnp.int32)


def chosen_experts(thinker: Thinker, x: jax.Array, position: jax.Array, cache: Any, mask: jax.Array) -> jax.Array:
    """The experts int32 [layers, rows, A] that embedded tokens x [B, T, D] choose after what the cache holds.

    position: float32 [3, B, T]. mask: bool [B, T, S], the slots that each token sees, itself included.
    """
    layers: DecoderLayers = thinker.layers
    config = layers.config
    rotation = rope(position, config.head_dim, config.rope, x.dtype)

    def over_cache(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, l: Any) -> jax.Array:
        return attend(q, cache.k[l], cache.v[l], mask)

    routed = [l for l in range(config.num_layers) if l not in config.dense_layers]
    _, _, inputs = layers.run(x, rotation, cache, over_cache, taps=tuple(routed))

    def choose(layer: tuple) -> jax.Array:
        l, i, x = layer
        rows = layers.router_inputs(x, l, rotation, cache, over_cache).reshape(-1, x.shape[-1])
        return route(rows, layers.moe.router[...][i], config.experts_per_token, config.norm_topk_prob)[0]

    return jax.lax.map(choose, (jnp.asarray(routed), jnp.arange(len(routed)), inputs))
