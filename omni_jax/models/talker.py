"""The Talker: what the Thinker read and wrote in, the first code of each frame of speech out.

    Thinker's hidden states (media) -> hidden_projection --+
    Thinker's token embeddings (text) -> text_projection --+-> decoder layers -> norm -> codec_head -> first code
    codes of the frame before -> embed + code predictor's -+                          \\-> CodePredictor -> other codes

It never sees the Thinker itself: whoever runs both hands over embeddings and hidden states of the Thinker's width.

Source: transformers `Qwen3OmniMoeTalkerForConditionalGeneration`.
"""

import jax
from flax import nnx

from omni_jax.config import TalkerConfig
from omni_jax.models.code_predictor import CodePredictor
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.param import Linear, RMSNorm, param, project
from omni_jax.ops.cache import KVCache
from omni_jax.ops.rope import rope


class Projection(nnx.Module):
    """fc2(silu(fc1(x))): from the Thinker's width to the Talker's."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, out: int):
        self.fc1 = Linear(rngs, (inner, width), ("mlp", "embed"))
        self.fc2 = Linear(rngs, (out, inner), ("embed", "mlp"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., out]."""
        return self.fc2(jax.nn.silu(self.fc1(x)))


class Talker(nnx.Module):
    """embed and codec_head [V, D], the projections, the decoder layers with their final norm, the code predictor."""

    def __init__(self, rngs: nnx.Rngs, config: TalkerConfig):
        V, D, F = config.text.vocab_size, config.text.hidden_size, config.text.intermediate_size
        self.config = config
        self.embed = param(rngs, (V, D), ("vocab", "embed"), scale=1.0)
        self.text_projection = Projection(rngs, config.thinker_hidden_size, F, D)
        self.hidden_projection = Projection(rngs, config.thinker_hidden_size, F, D)
        self.layers = DecoderLayers(rngs, config.text)
        self.norm = RMSNorm(rngs, D, config.text.rms_norm_eps)
        self.codec_head = param(rngs, (V, D), ("vocab", "embed"), scale=D**-0.5)
        self.code_predictor = CodePredictor(rngs, config.code_predictor, config.num_code_groups)

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codec ids int32 [...], prompt marks and first codes alike -> [..., D]."""
        return self.embed[...][codes]

    def whole(
        self, x: jax.Array, position_ids: jax.Array, cache: KVCache | None = None, first_valid: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Prompts [B, T, D] at positions float32 [3, B, T], real from `first_valid` [B] on -> normed states and the cache."""
        x, cache, _ = self.layers.whole(x, self._rope(position_ids, x), cache, first_valid)
        return self.norm(x), cache

    def extend(
        self, x: jax.Array, position_ids: jax.Array, cache: KVCache, unroll: int = 1
    ) -> tuple[jax.Array, KVCache]:
        """Inputs [B, T, D] at positions float32 [3, B, T] behind what the cache holds -> normed states, cache."""
        x, cache, _ = self.layers.extend(x, self._rope(position_ids, x), cache, unroll=unroll)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Normed states [..., D] -> float32 logits [..., V] of the first code."""
        return project(hidden, self.codec_head[...])

    def _rope(self, position_ids: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope(position_ids, self.config.text.head_dim, self.config.text.rope, x.dtype)
