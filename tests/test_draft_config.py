"""Drafters' configurations: the numbering of hidden states, which options are refused, what may not be missing."""

from typing import Any

import pytest

from omni_jax.draft_config import DFlashConfig, Eagle3Config, read_draft_config
from omni_jax.errors import ConfigError
from scripts.small.configs import PUBLIC_DFLASH
from scripts.small.drafter import draft_config_dict


def dflash(**changes: Any) -> DFlashConfig:
    return DFlashConfig.from_hf({**PUBLIC_DFLASH, **changes})


def eagle3(**changes: Any) -> Eagle3Config:
    return Eagle3Config.from_hf({**draft_config_dict("odd", "eagle3"), **changes})


def test_the_public_draft_is_read() -> None:
    config = read_draft_config(PUBLIC_DFLASH)
    assert isinstance(config, DFlashConfig)
    assert (config.block_size, config.mask_token_id, config.num_target_layers) == (8, 151662, 48)
    assert config.taps(48) == (2, 13, 24, 35, 46)
    assert config.layers.rope.theta == 1e6 and config.layers.qk_norm and not config.layers.num_experts
    assert config.windows == (None,) * 5 and config.causal == (False,) * 5


@pytest.mark.parametrize(
    "target, layers, ids",
    [
        (48, 5, (1, 12, 23, 34, 45)),
        (36, 5, (1, 9, 17, 25, 33)),
        (40, 5, (1, 10, 19, 28, 37)),
        (64, 5, (1, 16, 31, 46, 61)),
        (7, 2, (1, 4)),
        (9, 1, (4,)),
        # 3.5 and 8.5 are halves, which round to even.
        (14, 5, (1, 4, 6, 8, 11)),
    ],
)
def test_layers_that_a_file_does_not_state_are_spread(target: int, layers: int, ids: tuple[int, ...]) -> None:
    inner = {"mask_token_id": 5}
    config = dflash(dflash_config=inner, num_target_layers=target, num_hidden_layers=layers)
    assert config.target_layer_ids == ids


def test_options_stand_in_their_section_or_at_the_top() -> None:
    inner = {"mask_token_id": 7, "target_layer_ids": [3], "block_size": 4}
    config = dflash(dflash_config=inner, mask_token_id=9, target_layer_ids=[1], block_size=16)
    assert (config.mask_token_id, config.target_layer_ids, config.block_size) == (7, (3,), 4)
    config = dflash(dflash_config={}, mask_token_id=9, target_layer_ids=[1])
    assert (config.mask_token_id, config.target_layer_ids, config.block_size) == (9, (1,), 8)


def test_sliding_layers_are_causal_unless_the_file_says_otherwise() -> None:
    types = ["sliding_attention", "full_attention"]
    sliding = {"layer_types": types, "num_hidden_layers": 2, "sliding_window": 9, "use_sliding_window": True}
    assert dflash(**sliding).windows == (9, None)
    assert dflash(**sliding).causal == (True, False)
    assert dflash(**sliding, is_causal=False).causal == (False, False)
    assert dflash(**sliding, is_causal=True).causal == (True, True)


def test_multimodal_sections_are_dropped() -> None:
    scaling = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    assert dflash(rope_scaling=scaling).layers.rope == dflash().layers.rope


@pytest.mark.parametrize(
    "stated, taps",
    [
        ({}, (2, 24, 45)),
        ({"eagle_config": {"use_aux_hidden_state": True}}, (2, 24, 45)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 23, 44]}}, (2, 24, 45)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 24, 45]}}, (2, 24, 45)),
        ({"eagle_aux_hidden_state_layer_ids": [2, 24, 45]}, (2, 24, 45)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 24]}, (1, 24)),
    ],
)
def test_hidden_states_are_numbered_as_each_key_means(stated: dict, taps: tuple[int, ...]) -> None:
    config = eagle3(**stated)
    assert config.taps(48) == taps and config.features == len(taps)


def test_a_drafter_may_know_the_whole_vocabulary() -> None:
    assert eagle3(draft_vocab_size=None).draft_vocab_size == eagle3().layer.vocab_size


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash2DraftModel"),
        ({"architectures": 5}, "architectures' is 5"),
        ({"architectures": "DFlashDraftModel"}, "architectures' is 'DFlashDraftModel'"),
        ({"rope_parameters": 5}, "rope_parameters' is 5"),
        ({"layer_types": [["a"], 1, 2, 3, 4]}, "layer_types' is"),
        ({"dflash_config": 5}, "dflash_config' is 5"),
        ({"dflash_config": {**PUBLIC_DFLASH["dflash_config"], "target_layer_ids": ["x"]}}, "not a list of numbers"),
        ({"projector_type": "domino"}, "projector_type.*not implemented"),
        ({"dflash_config": {**PUBLIC_DFLASH["dflash_config"], "projector_type": "dspark"}}, "projector_type"),
        ({"dflash_config": {**PUBLIC_DFLASH["dflash_config"], "selector_top_k": 16}}, "selector_top_k"),
        ({"dflash_config": {**PUBLIC_DFLASH["dflash_config"], "conv_kernel_size": 2}}, "conv_kernel_size"),
        ({"attention_sink_bias": True}, "attention_sink_bias"),
        ({"attention_value_scale": 0.5}, "attention_value_scale"),
        ({"final_logit_softcapping": 20.0}, "final_logit_softcapping"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"draft_vocab_size": 32000}, "draft_vocab_size"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_theta": None}, "rope_theta.*is missing"),
        ({"block_size": 1}, "block_size"),
        ({"dflash_config": {"target_layer_ids": [1]}}, "mask_token_id.*missing"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 1]}}, "different layers"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [-1]}}, "numbers from 0 to"),
        ({"dflash_config": {"mask_token_id": 3}, "num_target_layers": None}, "target_layer_ids"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 5}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 5}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 8}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 5, "use_sliding_window": True}, "sliding_window"),
        ({"num_attention_heads": 15}, "15 attention heads"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_dflash_options_are_refused_by_name(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_draft_config({**PUBLIC_DFLASH, **changes})


@pytest.mark.parametrize("name", ["output_multiplier", "input_embedding_scale", "attention_value_scale"])
def test_options_that_change_nothing_are_accepted(name: str) -> None:
    assert dflash(**{name: 1.0, "final_logit_softcapping": 0.0, "attention_sink_bias": False}) == dflash()


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "Eagle3DeepseekV2ForCausalLM"),
        ({"fc_norm": True}, "fc_norm"),
        ({"norm_output": True}, "norm_output"),
        ({"norm_before_residual": True}, "norm_before_residual"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_experts": 8}, "num_experts"),
        ({"target_hidden_size": 4096}, "target_hidden_size"),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ({"draft_vocab_size": 10**6}, "draft_vocab_size"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 3]}, "different layers"),
        ({"rope_parameters": None}, "rope_theta.*is missing"),
    ],
)
def test_eagle3_options_are_refused_by_name(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        eagle3(**changes)


def test_other_models_are_no_drafters() -> None:
    with pytest.raises(ConfigError, match="MedusaModel"):
        read_draft_config({"architectures": ["MedusaModel"]})
