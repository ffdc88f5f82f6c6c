"""The Thinker: text, image, video and audio tokens in, next-token logits out.

    patches -> VisionEncoder --+
    mel     -> AudioEncoder  --+-> embedded tokens -> decoder layers -> norm -> logits
    token ids -> embed --------+

Encoders run on bucketed rows (a frame or an audio window each); `Media` holds their outputs flattened, and each token
carries the index of its feature, so that ragged media reach the text model by one gather.

Source: transformers `Qwen3OmniMoeThinkerForConditionalGeneration`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from omni_jax.config import ThinkerConfig
from omni_jax.models.audio import AudioEncoder
from omni_jax.models.decoder import DecoderLayers, Deepstack
from omni_jax.models.param import RMSNorm, param, project
from omni_jax.models.vision import VisionEncoder
from omni_jax.ops.cache import KVCache
from omni_jax.ops.rope import rope


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Media:
    """Encoded media: visual [X, D], its deepstack features [n, X, D], audio [Y, D]; None where a prompt has none.

    visual_index and audio_index int32 [B, T] say which feature a token is, -1 for none.
    """

    visual: jax.Array | None
    deepstack: jax.Array | None
    audio: jax.Array | None
    visual_index: jax.Array
    audio_index: jax.Array


class Thinker(nnx.Module):
    """embed and lm_head [V, D] (one array when tied), both encoders, the decoder layers and the final norm."""

    def __init__(self, rngs: nnx.Rngs, config: ThinkerConfig):
        V, D = config.text.vocab_size, config.text.hidden_size
        self.config = config
        self.embed = param(rngs, (V, D), ("vocab", "embed"), scale=1.0)
        self.vision = VisionEncoder(rngs, config.vision)
        self.audio = AudioEncoder(rngs, config.audio)
        self.layers = DecoderLayers(rngs, config.text)
        self.norm = RMSNorm(rngs, D, config.text.rms_norm_eps)
        if not config.text.tie_word_embeddings:
            self.lm_head = param(rngs, (V, D), ("vocab", "embed"), scale=D**-0.5)

    def embed_tokens(self, token_ids: jax.Array, media: Media | None = None) -> jax.Array:
        """Token ids int32 [B, T] -> [B, T, D], with media features in place of their placeholders."""
        x = self.embed[...][token_ids]
        if media is None:
            return x
        for features, index in ((media.visual, media.visual_index), (media.audio, media.audio_index)):
            if features is not None:
                x = jnp.where(index[..., None] >= 0, features[jnp.maximum(index, 0)].astype(x.dtype), x)
        return x

    def whole(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        cache: KVCache | None = None,
        first_valid: jax.Array | None = None,
        media: Media | None = None,
        taps: tuple[int, ...] = (),
    ) -> tuple[jax.Array, KVCache | None, jax.Array]:
        """Embedded sequences [B, T, D] at positions float32 [3, B, T] -> normed states, cache, taps [n, B, T, D].

        cache: empty, filled on the way. first_valid: int32 [B], the first token of each row that is not padding.
        """
        deepstack = None
        if media is not None and media.deepstack is not None:
            deepstack = Deepstack(media.deepstack, media.visual_index)
        x, cache, tapped = self.layers.whole(x, self._rope(position_ids, x), cache, first_valid, deepstack, taps)
        x, tapped = self._finish(x, tapped, taps)
        return x, cache, tapped

    def extend(
        self,
        x: jax.Array,
        position_ids: jax.Array,
        cache: KVCache,
        taps: tuple[int, ...] = (),
        unroll: int = 1,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache, jax.Array]:
        """Embedded tokens [B, T, D] behind what the cache holds -> normed states, cache, taps [n, B, T, D].

        mask: bool [B, T, S], the slots that each token sees, itself included; by default all up to its own.
        """
        rotation = self._rope(position_ids, x)
        x, cache, tapped = self.layers.extend(x, rotation, cache, taps=taps, unroll=unroll, mask=mask)
        x, tapped = self._finish(x, tapped, taps)
        return x, cache, tapped

    def _rope(self, position_ids: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rope(position_ids, self.config.text.head_dim, self.config.text.rope, x.dtype)

    def _finish(self, x: jax.Array, tapped: jax.Array, taps: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """The final norm, which gives the hidden state of the highest number."""
        x = self.norm(x)
        last = self.config.text.num_layers
        return x, tapped.at[taps.index(last)].set(x) if last in taps else tapped

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Normed states [..., D] -> float32 logits [..., V]."""
        head = self.embed if self.config.text.tie_word_embeddings else self.lm_head
        return project(hidden, head[...])
