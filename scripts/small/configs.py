"""The configurations of the small random checkpoints: the public one with other numbers.

"tiny" is for the demo, "medium" for the benchmark, "large" (2.3 GB in float32) for measuring how it loads. "small" and
"odd" are for tests: they differ from "tiny", from the public values and from each other in every size, so that a
constant hidden in the code fails. "odd" also has what the public checkpoint does not: tied embeddings, some layers
without experts, unnormalised routing weights, and the rotary base written as `rope_parameters`. "thinking" is the
Thinker of "tiny" alone, as in the public Thinking and Captioner checkpoints. "full" is the public configuration itself,
for shapes only.

Token ids come from the tokenizer: `config_dict` fills in the ids of its special tokens.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from scripts.small.tokenizer import build_tokenizer, token_ids

PUBLIC_CONFIG = Path(__file__).resolve().parents[2] / "tests" / "data" / "public_config.json"
Variant = Literal["tiny", "small", "odd", "thinking", "medium", "large"]
VARIANTS: tuple[str, ...] = get_args(Variant)
ABSENT = object()

_TINY = {
    "thinker_config": {
        "text_config": {
            "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
            "head_dim": 48, "intermediate_size": 320, "num_experts": 16, "num_experts_per_tok": 4,
            "moe_intermediate_size": 160, "vocab_size": 512, "max_position_embeddings": 32768,
            "rope_scaling": {"mrope_section": [8, 8, 8]},
        },
        "vision_config": {
            "depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 352, "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 1, 3], "out_hidden_size": 256,
        },
        "audio_config": {
            "encoder_layers": 3, "num_hidden_layers": 3, "d_model": 128, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 384, "downsample_hidden_size": 32, "n_window_infer": 400, "output_dim": 256,
        },
    },
    "talker_config": {
        "accept_hidden_layer": 2, "thinker_hidden_size": 256, "codec_pad_id": 516, "codec_bos_id": 517,
        "codec_eos_token_id": 518, "codec_nothink_id": 523, "codec_think_bos_id": 524, "codec_think_eos_id": 525,
        "speaker_id": {"chelsie": 601, "ethan": 602, "aiden": 603},
        "text_config": {
            "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 48, "intermediate_size": 288, "num_experts": 8, "num_experts_per_tok": 3,
            "moe_intermediate_size": 96, "shared_expert_intermediate_size": 128, "vocab_size": 1536,
            "max_position_embeddings": 32768, "rope_scaling": {"mrope_section": [8, 8, 8]},
        },
        "code_predictor_config": {
            "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "intermediate_size": 320, "layer_types": ["full_attention"] * 2, "vocab_size": 512,
        },
    },
    "code2wav_config": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 256, "codebook_size": 512, "sliding_window": 20, "decoder_dim": 128,
    },
}  # fmt: skip

_SMALL = {
    "thinker_config": {
        "position_id_per_seconds": 25, "seconds_per_chunk": 3,
        "text_config": {
            "hidden_size": 96, "num_hidden_layers": 5, "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 24, "intermediate_size": 112, "num_experts": 6, "num_experts_per_tok": 2,
            "moe_intermediate_size": 40, "vocab_size": 480, "max_position_embeddings": 4096, "rms_norm_eps": 1e-3,
            "rope_theta": 50000.0, "rope_scaling": {"mrope_section": [6, 3, 3]}, "tie_word_embeddings": True,
        },
        "vision_config": {
            "depth": 3, "hidden_size": 72, "num_heads": 3, "intermediate_size": 100, "num_position_embeddings": 100,
            "deepstack_visual_indexes": [0, 2], "out_hidden_size": 96, "patch_size": 14, "spatial_patch_size": 14,
            "spatial_merge_size": 3, "temporal_patch_size": 3,
        },
        "audio_config": {
            "encoder_layers": 2, "num_hidden_layers": 2, "d_model": 48, "encoder_attention_heads": 3,
            "encoder_ffn_dim": 88, "downsample_hidden_size": 12, "num_mel_bins": 80, "n_window": 51,
            "n_window_infer": 320, "max_source_positions": 200, "output_dim": 96,
        },
    },
    "talker_config": {
        "accept_hidden_layer": 3, "thinker_hidden_size": 96, "num_code_groups": 5, "spatial_merge_size": 3,
        "position_id_per_seconds": 25, "seconds_per_chunk": 3, "codec_pad_id": 130, "codec_bos_id": 131,
        "codec_eos_token_id": 135, "codec_nothink_id": 140, "codec_think_bos_id": 142, "codec_think_eos_id": 144,
        "speaker_id": {"ethan": 200, "vera": 203},
        "text_config": {
            "hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 16, "intermediate_size": 104, "num_experts": 5, "num_experts_per_tok": 2,
            "moe_intermediate_size": 36, "shared_expert_intermediate_size": 44, "vocab_size": 1144,
            "max_position_embeddings": 1024, "rms_norm_eps": 2e-3, "rope_theta": 20000.0, "norm_topk_prob": False,
            "rope_scaling": {"mrope_section": [4, 2, 2]},
        },
        "code_predictor_config": {
            "hidden_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
            "head_dim": 20, "intermediate_size": 96, "layer_types": ["full_attention"] * 3, "vocab_size": 120,
            "num_code_groups": 5, "rms_norm_eps": 3e-3, "rope_theta": 30000.0, "max_position_embeddings": 1024,
        },
    },
    "code2wav_config": {
        "hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 72, "codebook_size": 120, "sliding_window": 7, "decoder_dim": 48, "num_quantizers": 5,
        "upsample_rates": [5, 4, 2], "upsampling_ratios": [3], "rms_norm_eps": 1e-3, "rope_theta": 7000.0,
        "max_position_embeddings": 3000,
    },
}  # fmt: skip

_ODD = {
    "thinker_config": {
        "position_id_per_seconds": 10, "seconds_per_chunk": 1, "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 120, "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 40, "intermediate_size": 136, "num_experts": 10, "num_experts_per_tok": 3,
            "moe_intermediate_size": 56, "vocab_size": 560, "max_position_embeddings": 8192, "rms_norm_eps": 1e-2,
            "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3], "tie_word_embeddings": False,
            "rope_theta": ABSENT, "rope_scaling": ABSENT,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 12345.0, "mrope_section": [10, 6, 4], "interleaved": True
            },
        },
        "vision_config": {
            "depth": 5, "hidden_size": 60, "num_heads": 5, "intermediate_size": 76, "num_position_embeddings": 49,
            "deepstack_visual_indexes": [1, 2, 3, 4], "out_hidden_size": 120, "patch_size": 12,
            "spatial_patch_size": 12, "spatial_merge_size": 4, "temporal_patch_size": 1,
        },
        "audio_config": {
            "encoder_layers": 4, "num_hidden_layers": 4, "d_model": 56, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 68, "downsample_hidden_size": 10, "num_mel_bins": 100, "n_window": 49,
            "n_window_infer": 98, "max_source_positions": 60, "output_dim": 120,
        },
    },
    "talker_config": {
        "accept_hidden_layer": 5, "thinker_hidden_size": 120, "num_code_groups": 7, "spatial_merge_size": 4,
        "position_id_per_seconds": 10, "seconds_per_chunk": 1, "codec_pad_id": 96, "codec_bos_id": 99,
        "codec_eos_token_id": 97, "codec_nothink_id": 111, "codec_think_bos_id": 110, "codec_think_eos_id": 109,
        "speaker_id": {"ethan": 305, "mo": 301, "una": 302},
        "text_config": {
            "hidden_size": 104, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1,
            "head_dim": 28, "intermediate_size": 92, "num_experts": 7, "num_experts_per_tok": 4,
            "moe_intermediate_size": 28, "shared_expert_intermediate_size": 52, "vocab_size": 1120,
            "max_position_embeddings": 16384, "rms_norm_eps": 5e-3, "rope_theta": ABSENT, "rope_scaling": ABSENT,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 4321.0, "mrope_section": [6, 4, 4], "interleaved": True
            },
        },
        "code_predictor_config": {
            "hidden_size": 104, "num_hidden_layers": 1, "num_attention_heads": 5, "num_key_value_heads": 5,
            "head_dim": 24, "intermediate_size": 116, "layer_types": ["full_attention"], "vocab_size": 96,
            "num_code_groups": 7, "rms_norm_eps": 7e-3, "max_position_embeddings": 512,
            "rope_theta": ABSENT, "rope_scaling": ABSENT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 999.0},
        },
    },
    "code2wav_config": {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12,
        "intermediate_size": 84, "codebook_size": 96, "sliding_window": 5, "decoder_dim": 40, "num_quantizers": 7,
        "upsample_rates": [6, 3], "upsampling_ratios": [2, 3, 1], "rms_norm_eps": 4e-3, "max_position_embeddings": 999,
        "rope_theta": ABSENT, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    },
}  # fmt: skip

_MEDIUM = {
    "thinker_config": {
        "text_config": {
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
            "head_dim": 64, "intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 4,
            "moe_intermediate_size": 256, "vocab_size": 32768, "max_position_embeddings": 32768,
            "rope_scaling": {"mrope_section": [12, 10, 10]},
        },
        "vision_config": {
            "depth": 4, "hidden_size": 192, "num_heads": 4, "intermediate_size": 512, "num_position_embeddings": 576,
            "deepstack_visual_indexes": [0, 1, 2], "out_hidden_size": 768,
        },
        "audio_config": {
            "encoder_layers": 4, "num_hidden_layers": 4, "d_model": 192, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 512, "downsample_hidden_size": 48, "output_dim": 768,
        },
    },
    "talker_config": {
        "accept_hidden_layer": 6, "thinker_hidden_size": 768,
        "text_config": {
            "hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
            "head_dim": 64, "intermediate_size": 768, "num_experts": 8, "num_experts_per_tok": 3,
            "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256, "max_position_embeddings": 32768,
            "rope_scaling": {"mrope_section": [12, 10, 10]},
        },
        "code_predictor_config": {
            "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
            "head_dim": 64, "intermediate_size": 768, "layer_types": ["full_attention"] * 3,
        },
    },
    "code2wav_config": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 768, "decoder_dim": 192,
    },
}  # fmt: skip

# Four times the experts.
_LARGE = {"thinker_config": {"text_config": {"num_experts": 64}}}

_THINKING = {"enable_audio_output": False, "talker_config": ABSENT, "code2wav_config": ABSENT}

# What each variant changes in the public configuration, in this order.
_CHANGES: dict[str, tuple[dict, ...]] = {
    "tiny": (_TINY,), "small": (_SMALL,), "odd": (_ODD,), "thinking": (_TINY, _THINKING), "medium": (_MEDIUM,),
    "large": (_MEDIUM, _LARGE), "full": (),
}  # fmt: skip


def config_dict(variant: str, tokenizer: Any = None) -> dict:
    """The Hugging Face config of a variant or of "full", with the token ids of `tokenizer` (default: the variant's)."""
    if variant not in _CHANGES:
        raise ValueError(f"variant {variant!r} does not exist; choose from {sorted(_CHANGES)}")
    changes = _CHANGES[variant]
    if variant == "full":
        return changed_config(changes)
    return changed_config(changes, build_tokenizer(variant) if tokenizer is None else tokenizer)


def changed_config(changes: Sequence[dict], tokenizer: Any = None) -> dict:
    """The public Hugging Face config with changes laid over it in turn, and with the token ids of `tokenizer`."""
    config = json.loads(PUBLIC_CONFIG.read_text())
    for change in changes:
        config = _merge(config, change)
    if tokenizer is None:
        return config
    _set_token_ids(config, token_ids(tokenizer))
    text = config["thinker_config"]["text_config"]
    if text["vocab_size"] < tokenizer.get_vocab_size():
        text["vocab_size"] = -(-tokenizer.get_vocab_size() // 128) * 128
    return config


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it at every depth; ABSENT removes a key. Dicts of speakers are replaced whole."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        if value is ABSENT:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "speaker_id":
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _set_token_ids(config: dict, ids: dict[str, int]) -> None:
    """Write every id that the configuration states, in each of the sections that repeat it."""
    for section in (config, config["thinker_config"], config.get("talker_config", {})):
        for name in [key for key in section if key.removesuffix("_token_id") in ids]:
            section[name] = ids[name.removesuffix("_token_id")]


# What the public block-8 draft for Qwen3-Omni states.
PUBLIC_DFLASH: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"], "attention_bias": False, "block_size": 8, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 8192,
    "num_attention_heads": 16, "num_hidden_layers": 5, "num_key_value_heads": 8, "num_target_layers": 48,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000, "vocab_size": 152064, "use_cache": True,
    "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": False,
    "dflash_config": {"mask_token_id": 151662, "target_layer_ids": [1, 12, 23, 34, 45]},
}  # fmt: skip
