"""The Talker: from what the Thinker read and wrote to the first code of each frame of speech.

    Thinker's hidden states (media) -> hidden_projection --+
    Thinker's token embeddings (text) -> text_projection --+-> decoder layers -> norm -> codec_head -> first code
    codes of the frame before -> embed + code predictor's -+                          \\-> CodePredictor -> other codes

It never sees the Thinker itself: the caller passes embeddings and hidden states of the Thinker's width.

Source: transformers `Qwen3OmniMoeTalkerForConditionalGeneration`.
"""

from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.config import TalkerConfig
from omni_jax.models.code_predictor import CodePredictor
from omni_jax.models.decoder import DecoderLayers
from omni_jax.models.output import CachedLogits, CachedOutput, Output, check_sequences, count_valid, left_padding
from omni_jax.models.param import Linear, Module, RMSNorm, param, project
from omni_jax.ops.cache import KVCache
from omni_jax.ops.rope import rope, text_positions
from omni_jax.sharding import Array


class Projection(Module):
    """fc2(silu(fc1(x))): from the Thinker's width to the Talker's."""

    def __init__(self, rngs: nnx.Rngs, width: int, inner: int, out: int):
        self.fc1 = Linear(rngs, (inner, width), ("mlp", "embed"))
        self.fc2 = Linear(rngs, (out, inner), ("embed", "mlp"))

    @jax.named_scope("projection")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., out]."""
        return self.fc2(jax.nn.silu(self.fc1(x)))


class Talker(Module):
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

    @overload
    def __call__(
        self, x: Array, position_ids: Array | None = None, *, mask: Array | None = None, cache: None = None
    ) -> jax.Array: ...

    @overload
    def __call__(
        self, x: Array, position_ids: Array | None = None, *, mask: Array | None = None, cache: KVCache
    ) -> CachedLogits: ...

    def __call__(
        self, x: Array, position_ids: Array | None = None, *, mask: Array | None = None, cache: KVCache | None = None
    ) -> jax.Array | CachedLogits:
        """Logits float32 [B, T, V] of each frame's first code, for inputs [B, T, D]; with a cache, `CachedLogits`.

        x: sums of what `text_projection`, `hidden_projection`, `embed_codes` and the code predictor's tables give.
        position_ids: float32 [3, B, T]; by default counted from each row's first input, cached ones included.
        mask: bool [B, T], False at padding, left or right; with a cache right only. Logits at padding mean nothing.
        cache: what goes before; it must have room for T inputs more. The one that is returned holds them.

        Raises InputError for arrays of other shapes.
        """
        x = jnp.asarray(x)
        check_sequences("x", x, "[B, T, D]", 3, position_ids, mask, cache)
        if cache is None:
            start = left_padding(mask, *x.shape[:2])
            position_ids = text_positions(-start, x.shape[1]) if position_ids is None else jnp.asarray(position_ids)
            return self.logits(self.forward(x, position_ids, None if mask is None else start).hidden)
        if position_ids is None:
            position_ids = text_positions(cache.length, x.shape[1])
        out = self.extend(x, jnp.asarray(position_ids), cache)
        return CachedLogits(self.logits(out.hidden), count_valid(out.cache, cache, mask))

    def empty_cache(self, rows: int, capacity: int) -> KVCache:
        """A cache [L, rows, K, capacity, H] that holds nothing yet, in the type of the parameters."""
        c = self.config.text
        dtype, mesh = self.embed[...].dtype, self.layers.mesh
        return KVCache.empty(c.num_layers, rows, c.num_kv_heads, capacity, c.head_dim, dtype, mesh)

    @jax.named_scope("embed")
    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Codec ids int32 [...], prompt marks and first codes alike -> [..., D]."""
        return self.embed[...][codes]

    def forward(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        first_valid: jax.Array | None = None,
        counted: jax.Array | None = None,
        remat: bool = False,
    ) -> Output:
        """Whole sequences [B, T, D] at positions float32 [3, B, T] -> normed states [B, T, D].

        first_valid: int32 [B], the first input of each row that is not padding. counted, remat: as in
        `DecoderLayers.forward`.
        """
        out = self.layers.forward(x, self._rope(position_ids, x), first_valid, counted=counted, remat=remat)
        return Output(self.norm(out.hidden), out.taps, out.load)

    def prefill(self, x: jax.Array, position_ids: jax.Array, cache: KVCache) -> CachedOutput:
        """As `forward`, right-padded prompts [B, T, D], which the empty `cache` of at least T slots then holds."""
        out = self.layers.prefill(x, self._rope(position_ids, x), cache)
        return CachedOutput(self.norm(out.hidden), out.cache, out.taps)

    def extend(self, x: jax.Array, position_ids: jax.Array, cache: KVCache, unroll: int | None = None) -> CachedOutput:
        """Inputs [B, T, D] at positions float32 [3, B, T] after what the cache holds -> normed states [B, T, D]."""
        out = self.layers.extend(x, self._rope(position_ids, x), cache, unroll=unroll)
        return CachedOutput(self.norm(out.hidden), out.cache, out.taps)

    @jax.named_scope("logits")
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Normed states [..., D] -> float32 logits [..., V] of the first code."""
        return project(hidden, self.codec_head[...])

    def _rope(self, position_ids: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope(position_ids, self.config.text.head_dim, self.config.text.rope, x.dtype)
