"""New drafters at the sizes of their target: the config.json of their public layouts, and random parameters.

Sizes that nobody states follow from the target's as those of the public drafters for Qwen3-Omni do: heads that make up
the width, half as many for keys and values, an MLP of four times the width, and the hidden states that the papers name.
A target of very few layers, for which these coincide, is read at evenly spread ones.

Deliberate difference: EAGLE-3's head begins as the rows of the target's, not at random.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from omni_jax.config import DecoderConfig, OmniConfig
from omni_jax.draft_config import EAGLE3_FEATURES, read_draft_config
from omni_jax.errors import InputError
from omni_jax.models.dflash import DFlash
from omni_jax.models.eagle3 import Eagle3
from omni_jax.models.param import init_params
from omni_jax.weights.drafters import Drafter, check_drafter, declare_drafter

# The token that stands for what is to be drafted: the public drafters take this one, which no text holds.
MASK = "<|fim_pad|>"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a new drafter; 0 for what follows from the target."""

    heads: int = 0
    """Query heads of a layer."""
    kv_heads: int = 0
    """Heads of a layer for keys and values."""
    head_dim: int = 0
    """Numbers of a head."""
    mlp: int = 0
    """Width of the MLP."""

    def values(self, text: DecoderConfig) -> dict[str, Any]:
        """What config.json states of a layer, for a target of these sizes."""
        head = self.head_dim or text.head_dim
        heads = self.heads or max(1, text.hidden_size // head)
        shared = self.kv_heads or next(n for n in range(max(1, heads // 2), 0, -1) if heads % n == 0)
        return {
            "hidden_size": text.hidden_size, "vocab_size": text.vocab_size, "num_attention_heads": heads,
            "num_key_value_heads": shared, "head_dim": head, "intermediate_size": self.mlp or 4 * text.hidden_size,
            "rms_norm_eps": text.rms_norm_eps, "rope_theta": text.rope.theta, "rope_scaling": None,
            "max_position_embeddings": text.max_position_embeddings, "attention_bias": False, "hidden_act": "silu",
            "tie_word_embeddings": False,
        }  # fmt: skip


def new_dflash(
    target: OmniConfig, mask_token_id: int, layers: int, features: int, block_size: int, sizes: Sizes, seed: int
) -> Drafter:
    """A DFlash drafter of `layers` layers that reads `features` hidden states, float32.

    Raises ConfigError or InputError for sizes that cannot be.
    """
    text = target.thinker.text
    values = {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", **sizes.values(text),
        "num_hidden_layers": layers, "num_target_layers": text.num_layers, "block_size": block_size,
        "layer_types": ["full_attention"] * layers, "use_sliding_window": False, "sliding_window": None,
        "dflash_config": {"mask_token_id": mask_token_id, "target_layer_ids": spread_layers(features, text.num_layers)},
        "dtype": "float32",
    }  # fmt: skip
    drafter = _drafter(values)
    drafter.params.update(init_params(DFlash, drafter.config, seed=seed))
    check_drafter(drafter, target)
    return drafter


def new_eagle3(target: OmniConfig, offsets: np.ndarray, head: Any, sizes: Sizes, seed: int) -> Drafter:
    """An EAGLE-3 drafter that knows some tokens, float32.

    offsets: int [Vd], what to add to a draft id to get the token id. head: the target's [V, D], of which the drafter's
    begins as a part. Raises ConfigError or InputError for sizes that cannot be.
    """
    text = target.thinker.text
    values = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **sizes.values(text),
        "num_hidden_layers": 1, "draft_vocab_size": len(offsets), "dtype": "float32", **_read_states(text.num_layers),
    }  # fmt: skip
    drafter = _drafter(values)
    known = np.arange(len(offsets)) + offsets
    drafter.params.update(init_params(Eagle3, drafter.config, False, seed=seed))
    drafter.params["lm_head"] = jnp.asarray(head[known], jnp.float32)
    drafter.params["d2t"] = jnp.asarray(offsets, jnp.int32)
    check_drafter(drafter, target)
    return drafter


def spread_layers(features: int, layers: int) -> list[int]:
    """The layers of a target of `layers` whose outputs DFlash reads: as published, or evenly spread if these coincide.

    Source: z-lab `build_target_layer_ids`.
    """
    if not 1 <= features <= layers:
        raise InputError(f"{features} hidden states of a model of {layers} layers; read from 1 to {layers}")
    if features == 1:
        return [layers // 2]
    published = [round(1 + i * (layers - 4) / (features - 1)) for i in range(features)]
    distinct = len(set(published)) == features and min(published) >= 0
    return published if distinct else np.linspace(0, layers - 1, features).round().astype(int).tolist()


def chain_taps(layers: int) -> tuple[int, ...]:
    """The numbers of the hidden states that EAGLE-3 reads of a target of `layers`: the usual three, or spread ones."""
    usual = (2, layers // 2, layers - 3)
    if usual == tuple(sorted(set(usual))):
        return usual
    return tuple(np.unique(np.linspace(1, layers, EAGLE3_FEATURES).round().astype(int)).tolist())


def _read_states(layers: int) -> dict[str, Any]:
    """What config.json states of them; both keys count otherwise, as `draft_config` says."""
    taps = chain_taps(layers)
    if taps[0] != 2:
        return {"eagle_aux_hidden_state_layer_ids": list(taps)}
    outputs = [number - 1 for number in taps]
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": outputs, "use_aux_hidden_state": True}}


def _drafter(values: dict[str, Any]) -> Drafter:
    config = read_draft_config(values, "config.json of the new drafter")
    kind, declaration = declare_drafter(config)
    return Drafter(kind, config, declaration, {}, values, {})
