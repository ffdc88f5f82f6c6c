"""The Thinker: text, image, video and audio tokens in, next-token logits out.

    patches -> VisionEncoder --+
    mel     -> AudioEncoder  --+-> embedded tokens -> decoder layers -> norm -> logits
    token ids -> embed --------+

Encoders run on bucketed rows (a frame or an audio window each); `Media` holds their outputs flattened, and each token
carries the index of its feature, so that ragged media reach the text model by one gather.

Source: transformers `Qwen3OmniMoeThinkerForConditionalGeneration`.
"""

from dataclasses import dataclass
from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.config import ThinkerConfig
from omni_jax.models.audio import AudioEncoder
from omni_jax.models.decoder import DecoderLayers, Deepstack
from omni_jax.models.low_rank import NOTHING, LowRankConfig
from omni_jax.models.output import CachedLogits, CachedOutput, Output, check_sequences, count_valid, left_padding
from omni_jax.models.param import Module, RMSNorm, param, project
from omni_jax.models.vision import VisionEncoder
from omni_jax.ops.cache import KVCache
from omni_jax.ops.rope import rope, text_positions
from omni_jax.sharding import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Media:
    """Encoded media: visual [X, D], its deepstack features [n, X, D], audio [Y, D]; None where a prompt has none.

    visual_index and audio_index int32 [B, T]: the feature that each token is, -1 for none.
    """

    visual: jax.Array | None
    deepstack: jax.Array | None
    audio: jax.Array | None
    visual_index: jax.Array
    audio_index: jax.Array


class Thinker(Module):
    """embed and lm_head [V, D] (one array when tied), both encoders, the decoder layers and the final norm.

    lora: which projections of the decoder layers have low-rank updates.
    """

    def __init__(self, rngs: nnx.Rngs, config: ThinkerConfig, lora: LowRankConfig = NOTHING):
        V, D = config.text.vocab_size, config.text.hidden_size
        self.config = config
        self.embed = param(rngs, (V, D), ("vocab", "embed"), scale=1.0)
        self.vision = VisionEncoder(rngs, config.vision)
        self.audio = AudioEncoder(rngs, config.audio)
        self.layers = DecoderLayers(rngs, config.text, lora)
        self.norm = RMSNorm(rngs, D, config.text.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = param(rngs, (V, D), ("vocab", "embed"), scale=D**-0.5)

    @overload
    def __call__(
        self,
        token_ids: Array,
        position_ids: Array | None = None,
        *,
        mask: Array | None = None,
        media: Media | None = None,
        cache: None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        token_ids: Array,
        position_ids: Array | None = None,
        *,
        mask: Array | None = None,
        media: Media | None = None,
        cache: KVCache,
    ) -> CachedLogits: ...

    def __call__(
        self,
        token_ids: Array,
        position_ids: Array | None = None,
        *,
        mask: Array | None = None,
        media: Media | None = None,
        cache: KVCache | None = None,
    ) -> jax.Array | CachedLogits:
        """Next-token logits float32 [B, T, V] of token ids int [B, T]; with a cache, `CachedLogits`.

        position_ids: float32 [3, B, T] (time, height, width); by default those of text, counted from each row's first
            token, cached ones included.
        mask: bool [B, T], False at padding, left or right; with a cache right only. Logits at padding mean nothing.
        media: encoded pictures, videos and sounds, as `Omni.encode` gives them.
        cache: what goes before; it must have room for T tokens more. The one that is returned holds them.

        Raises InputError for arrays of other shapes.
        """
        token_ids = jnp.asarray(token_ids)
        check_sequences("token_ids", token_ids, "int [B, T]", 2, position_ids, mask, cache)
        x = self.embed_tokens(token_ids, media)
        if cache is None:
            start = left_padding(mask, *token_ids.shape)
            position_ids = text_positions(-start, x.shape[1]) if position_ids is None else jnp.asarray(position_ids)
            return self.logits(self.forward(x, position_ids, None if mask is None else start, media).hidden)
        if position_ids is None:
            position_ids = text_positions(cache.length, x.shape[1])
        out = self.extend(x, jnp.asarray(position_ids), cache, media=media)
        return CachedLogits(self.logits(out.hidden), count_valid(out.cache, cache, mask))

    def empty_cache(self, rows: int, capacity: int) -> KVCache:
        """A cache [L, rows, K, capacity, H] that holds nothing yet, in the type of the parameters."""
        c = self.config.text
        dtype, mesh = self.embed[...].dtype, self.layers.mesh
        return KVCache.empty(c.num_layers, rows, c.num_kv_heads, capacity, c.head_dim, dtype, mesh)

    @jax.named_scope("embed")
    def embed_tokens(self, token_ids: jax.Array, media: Media | None = None) -> jax.Array:
        """Token ids int32 [B, T] -> [B, T, D], with media features in place of their placeholders."""
        x = self.embed[...][token_ids]
        if media is None:
            return x
        for features, index in ((media.visual, media.visual_index), (media.audio, media.audio_index)):
            if features is not None:
                x = jnp.where(index[..., None] >= 0, features[jnp.maximum(index, 0)].astype(x.dtype), x)
        return x

    def forward(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        first_valid: jax.Array | None = None,
        media: Media | None = None,
        taps: tuple[int, ...] = (),
        counted: jax.Array | None = None,
        remat: bool = False,
    ) -> Output:
        """Embedded sequences [B, T, D] at positions float32 [3, B, T] -> normed states [B, T, D], taps [n, B, T, D].

        first_valid, counted, remat: as in `DecoderLayers.forward`. taps: numbers of hidden states to give.
        """
        rotation, deepstack = self._rope(position_ids, x), _deepstack(media)
        out = self.layers.forward(x, rotation, first_valid, deepstack, taps, counted, remat)
        return Output(*self._finish(out, taps), out.load)

    def prefill(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        cache: KVCache,
        media: Media | None = None,
        taps: tuple[int, ...] = (),
    ) -> CachedOutput:
        """As `forward`, right-padded sequences [B, T, D]: the empty `cache` of at least T slots then holds all T."""
        out = self.layers.prefill(x, self._rope(position_ids, x), cache, _deepstack(media), taps)
        hidden, tapped = self._finish(out, taps)
        return CachedOutput(hidden, out.cache, tapped)

    def extend(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        cache: KVCache,
        taps: tuple[int, ...] = (),
        unroll: int | None = None,
        mask: jax.Array | None = None,
        media: Media | None = None,
    ) -> CachedOutput:
        """Embedded tokens [B, T, D] at positions float32 [3, B, T] after what the cache holds; results as `prefill`.

        mask: bool [B, T, S], the slots that each token sees, itself included; by default all up to its own. unroll: how
        many layers the compiled loop holds at once.
        """
        rotation, deepstack = self._rope(position_ids, x), _deepstack(media)
        out = self.layers.extend(x, rotation, cache, taps=taps, unroll=unroll, mask=mask, deepstack=deepstack)
        hidden, tapped = self._finish(out, taps)
        return CachedOutput(hidden, out.cache, tapped)

    def _rope(self, position_ids: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope(position_ids, self.config.text.head_dim, self.config.text.rope, x.dtype)

    @jax.named_scope("norm")
    def _finish(self, out: Output | CachedOutput, taps: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Normed states and taps: the final norm gives the hidden state of the highest number."""
        x = self.norm(out.hidden)
        last = self.config.text.num_layers
        return x, out.taps.at[taps.index(last)].set(x) if last in taps else out.taps

    @jax.named_scope("logits")
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Normed states [..., D] -> float32 logits [..., V]."""
        return project(hidden, self.head)

    @property
    def head(self) -> jax.Array:
        """The weights [V, D] of the logits."""
        return (self.embed if self.config.tie_word_embeddings else self.lm_head)[...]


def _deepstack(media: Media | None) -> Deepstack | None:
    if media is None or media.deepstack is None:
        return None
    return Deepstack(media.deepstack, media.visual_index)
