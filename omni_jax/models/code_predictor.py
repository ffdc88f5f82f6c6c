"""The code predictor: the residual codes of one frame, one codebook after the other.

    Talker's state, embedding of the frame's first code -> decoder layers -> code 1 -> its embedding -> ... -> code Q-1

A small causal transformer that starts anew in every frame. Each codebook has its own embedding table and head: number
i belongs to code i + 1 (code 0 is the Talker's).

Source: transformers `Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.config import DecoderConfig
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.output import CachedOutput
from omni_jax.models.param import Module, RMSNorm, param, project
from omni_jax.ops.cache import KVCache
from omni_jax.ops.rope import rope


class CodePredictor(Module):
    """embed and lm_head [Q - 1, V, D], the decoder layers and the final norm."""

    def __init__(self, rngs: nnx.Rngs, config: DecoderConfig, codebooks: int):
        V, D = config.vocab_size, config.hidden_size
        axes = (None, "vocab", "embed")
        self.config = config
        self.embed = param(rngs, (codebooks - 1, V, D), axes, scale=1.0)
        self.layers = DecoderLayers(rngs, config)
        self.norm = RMSNorm(rngs, D, config.rms_norm_eps)
        self.lm_head = param(rngs, (codebooks - 1, V, D), axes, scale=D**-0.5)

    @jax.named_scope("code_predictor")
    def forward(self, x: jax.Array, remat: bool = False) -> jax.Array:
        """Whole frames [B, Q, D], a Talker's state and the codes 0 to Q - 2, embedded -> normed states [B, Q, D].

        The last Q - 1 states predict the codes 1 to Q - 1. remat: as in `DecoderLayers.forward`.
        """
        B, Q, _ = x.shape
        position = jnp.broadcast_to(jnp.arange(Q, dtype=jnp.float32), (B, Q))
        cos_sin = rope(position, self.config.head_dim, self.config.rope, x.dtype)
        return self.norm(self.layers.forward(x, cos_sin, remat=remat).hidden)

    @jax.named_scope("code_predictor")
    def extend(self, x: jax.Array, cache: KVCache) -> CachedOutput:
        """Embedded codes [B, T, D] after what the cache holds -> normed states [B, T, D] and the cache."""
        position = cache.length[:, None] + jnp.arange(x.shape[1])
        cos_sin = rope(position.astype(jnp.float32), self.config.head_dim, self.config.rope, x.dtype)
        out = self.layers.extend(x, cos_sin, cache)
        return CachedOutput(self.norm(out.hidden), out.cache, out.taps)

    @jax.named_scope("code_embed")
    def embed_code(self, code: jax.Array, i: Any) -> jax.Array:
        """Codes int32 [B] of codebook i + 1 -> [B, D]."""
        return self.embed[...][i, code]

    @jax.named_scope("code_embed")
    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [..., Q - 1] of the codebooks from number 1 on -> [..., Q - 1, D]."""
        return self.embed[...][jnp.arange(codes.shape[-1]), codes]

    @jax.named_scope("code_logits")
    def logits(self, hidden: jax.Array, i: Any) -> jax.Array:
        """Normed states [..., D] -> float32 logits [..., V] of codebook i + 1."""
        return project(hidden, self.lm_head[...][i])
