"""The sizes of omni-nano, and its tokenizer.

The architecture is the public one with smaller numbers; patches, mel bins, frame rates, the number of codebooks and the
positions of time are the public ones too, so that whatever prepares inputs for the public model does so for this one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from scripts.nano.words import NUMBERS
from scripts.small.configs import changed_config
from scripts.small.tokenizer import SPECIAL_TOKENS, train_tokenizer

# Tokens of text, before the special ones. The nouns are none of the texts that these are learned from, so that they
# fall into letters and short pieces, which can be spelled.
TEXT_TOKENS = 608
# The area of a resized picture: those of 64 pixels a side are doubled, so that a letter or a thing covers more patches,
# and pictures of all sizes that the senses have are at most 64 patches.
PIXELS = {"min_pixels": 100 * 100, "max_pixels": 128 * 128}

NANO: dict[str, Any] = {
    "thinker_config": {
        "text_config": {
            "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 96, "vocab_size": 640, "max_position_embeddings": 4096,
            "rope_scaling": {"mrope_section": [6, 5, 5]}, "rope_theta": 10000.0,
        },
        "vision_config": {
            "depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 192, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1], "out_hidden_size": 128,
        },
        "audio_config": {
            "encoder_layers": 4, "num_hidden_layers": 4, "d_model": 96, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 256, "downsample_hidden_size": 16, "n_window_infer": 200, "output_dim": 128,
        },
    },
    "talker_config": {
        "accept_hidden_layer": 2, "thinker_hidden_size": 128, "codec_pad_id": 132, "codec_bos_id": 133,
        "codec_eos_token_id": 134, "codec_nothink_id": 139, "codec_think_bos_id": 140, "codec_think_eos_id": 141,
        "speaker_id": {"chelsie": 150, "ethan": 151},
        "text_config": {
            "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 24, "intermediate_size": 192, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "vocab_size": 1152,
            "max_position_embeddings": 4096, "rope_scaling": {"mrope_section": [4, 4, 4]}, "rope_theta": 10000.0,
        },
        "code_predictor_config": {
            "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 24, "intermediate_size": 192, "layer_types": ["full_attention"] * 2, "vocab_size": 128,
            "max_position_embeddings": 64,
        },
    },
    "code2wav_config": {
        "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 192, "codebook_size": 128, "sliding_window": 16, "decoder_dim": 160,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip


def nano_tokenizer(texts: Sequence[str]) -> Any:
    """A `tokenizers.Tokenizer` whose tokens are learned from the wordings `texts`, the same at every call."""
    return train_tokenizer(list(_weighted(texts)), TEXT_TOKENS, SPECIAL_TOKENS)


def nano_config(tokenizer: Any) -> dict[str, Any]:
    """The Hugging Face config of omni-nano with the ids of its tokenizer."""
    return changed_config((NANO,), tokenizer)


def _weighted(texts: Sequence[str]) -> Iterator[str]:
    # The role names and the numbers end as one token each.
    yield from ["system", "user", "assistant"] * 50
    for word in NUMBERS:
        yield from [f" {word}", word.capitalize()] * 50
    yield from (text.replace("{0}", "").replace("{1}", "") for text in texts for _ in range(10))
