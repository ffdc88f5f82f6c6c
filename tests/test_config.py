"""Reading config.json: the public values, both ways of writing the rotary base, and one clear error for all else."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError
from scripts.small.configs import config_dict


@pytest.fixture
def public(data_dir: Path) -> dict:
    return json.loads((data_dir / "public_config.json").read_text())


def change(values: dict, path: str, value: Any = None) -> dict:
    """A copy with `path` ("a.b.c") set to `value`, or removed when that is None."""
    changed = copy.deepcopy(values)
    *parents, last = path.split(".")
    node = changed
    for name in parents:
        node = node[name]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return changed


def test_the_public_values(public: dict) -> None:
    config = OmniConfig.from_hf(public)
    text = config.thinker.text
    assert (text.num_layers, text.hidden_size, text.num_heads, text.num_kv_heads) == (48, 2048, 32, 4)
    assert (text.num_experts, text.experts_per_token, text.moe_intermediate_size) == (128, 8, 768)
    assert text.rope.theta == 1e6 and text.rope.mrope_section == (24, 20, 20) and not text.dense_layers
    assert config.thinker.audio_token_id == 151675 and config.thinker.position_id_per_seconds == 13
    assert config.thinker.vision.deepstack_layers == (8, 16, 24) and config.thinker.vision.patch_dim == 1536
    assert config.thinker.audio.chunk_frames == 100 and config.thinker.audio.window_chunks == 8
    assert config.talker and dict(config.talker.speakers)["ethan"] == 2302
    assert config.code2wav and config.code2wav.transformer.sliding_window == 72


def test_rope_parameters_are_read_like_rope_theta(public: dict) -> None:
    other = copy.deepcopy(public)
    text = other["thinker_config"]["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    assert OmniConfig.from_hf(other) == OmniConfig.from_hf(public)
    renamed = copy.deepcopy(public)
    talker = renamed["talker_config"]["text_config"]
    talker["num_local_experts"] = talker.pop("num_experts")
    assert OmniConfig.from_hf(renamed) == OmniConfig.from_hf(public)


def test_a_checkpoint_without_speech(public: dict) -> None:
    silent = change(change(public, "enable_audio_output", False), "talker_config")
    config = OmniConfig.from_hf(silent)
    assert config.talker is None and config.code2wav is None


def test_what_the_reference_has_defaults_for_may_be_absent(public: dict) -> None:
    """Just the reference's own, at the top of the file; here too null means absent."""
    from transformers import Qwen3OmniMoeConfig

    short, theirs = public, Qwen3OmniMoeConfig()
    for name in [key for key, value in public.items() if key.endswith("_token_id") or isinstance(value, bool)]:
        short = change(short, name)
    config = OmniConfig.from_hf(short)
    assert config == OmniConfig.from_hf(public) and config.talker is not None
    top = {name: i for name, i in config.token_ids.items() if not hasattr(config.thinker, name)}
    assert len(top) == 8 and top == {name: getattr(theirs, name) for name in top} and theirs.enable_audio_output
    assert OmniConfig.from_hf(change(change(public, "enable_audio_output", None), "user_token_id", None)) == config


def test_layers_without_experts() -> None:
    values = config_dict("odd")
    text = OmniConfig.from_hf(values).thinker.text
    section = values["thinker_config"]["text_config"]
    assert text.dense_layers == tuple(
        i
        for i in range(text.num_layers)
        if i in section["mlp_only_layers"] or (i + 1) % section["decoder_sparse_step"] != 0
    )
    assert 0 < len(text.dense_layers) < text.num_layers


@pytest.mark.parametrize("variant, ties", [("small", False), ("odd", True)])
def test_the_thinker_says_whether_head_and_embedding_are_one(variant: str, ties: bool) -> None:
    values = config_dict(variant)["thinker_config"]
    assert values["text_config"]["tie_word_embeddings"] != values.get("tie_word_embeddings", False) == ties
    assert OmniConfig.from_hf(config_dict(variant)).thinker.tie_word_embeddings == ties


def test_a_window_that_the_reference_does_not_apply_is_ignored(public: dict) -> None:
    for section in ("thinker_config.text_config", "talker_config.text_config", "talker_config.code_predictor_config"):
        assert OmniConfig.from_hf(change(public, f"{section}.sliding_window", 4096)) == OmniConfig.from_hf(public)


def test_a_voice_may_have_two_names_and_a_token_the_first_id(public: dict) -> None:
    config = OmniConfig.from_hf(change(change(public, "talker_config.speaker_id.Omar", 2302), "tts_pad_token_id", 0))
    assert config.talker and dict(config.talker.speakers) == {
        "Omar": 2302,
        "ethan": 2302,
        "chelsie": 2301,
        "aiden": 2303,
    }
    assert config.token_ids["tts_pad_token_id"] == 0 and len(config.token_ids) == 13


def test_a_model_ten_times_as_large(public: dict) -> None:
    text, vision = public["thinker_config"]["text_config"], public["thinker_config"]["vision_config"]
    for section, names in (
        (text, ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "rope_theta")),
        (text, ("num_experts_per_tok", "moe_intermediate_size", "intermediate_size", "max_position_embeddings")),
        (vision, ("depth", "hidden_size", "num_heads", "intermediate_size")),
        (public["talker_config"]["text_config"], ("num_hidden_layers", "intermediate_size", "moe_intermediate_size")),
        (public["code2wav_config"], ("sliding_window", "decoder_dim", "num_hidden_layers", "max_position_embeddings")),
    ):
        section.update({name: 10 * section[name] for name in names})
    text["num_experts"] = 1000
    assert OmniConfig.from_hf(public).thinker.text.num_layers == 480


THINKER = "thinker_config"
WRONG: list[tuple[Callable[[dict], dict], str]] = [
    (lambda v: {}, "model_type"),
    (lambda v: change(v, "model_type", "llama"), "model_type is 'llama'"),
    (lambda v: change(v, THINKER), "'thinker_config' is missing"),
    (lambda v: change(v, f"{THINKER}.text_config.vocab_size", 0), "vocab_size"),
    (lambda v: change(v, f"{THINKER}.text_config.hidden_size"), "thinker_config.text_config.hidden_size' is missing"),
    (lambda v: change(v, f"{THINKER}.text_config.hidden_size", "big"), "not of type int"),
    (lambda v: change(v, f"{THINKER}.text_config.hidden_size", -4), "positive"),
    (lambda v: change(v, f"{THINKER}.text_config.num_key_value_heads", 5), "do not divide"),
    (lambda v: change(v, f"{THINKER}.text_config.num_experts_per_tok", 129), "experts per token"),
    (lambda v: change(v, f"{THINKER}.text_config.norm_topk_prob", 1), "norm_topk_prob"),
    (lambda v: change(v, f"{THINKER}.text_config.attention_bias", True), "attention_bias"),
    (lambda v: change(v, f"{THINKER}.text_config.hidden_act", "relu"), "hidden_act"),
    (lambda v: change(v, f"{THINKER}.text_config.rope_theta"), "rope_theta"),
    (lambda v: change(v, f"{THINKER}.text_config.rope_scaling.rope_type", "yarn"), "yarn"),
    (lambda v: change(v, f"{THINKER}.text_config.rope_scaling.mrope_section"), "mrope_section"),
    (lambda v: change(v, f"{THINKER}.text_config.rope_scaling.mrope_section", [1, 2, 3]), "mrope_section"),
    (lambda v: change(v, f"{THINKER}.vision_config.num_position_embeddings", 2305), "square"),
    (lambda v: change(v, f"{THINKER}.vision_config.deepstack_visual_indexes", [8, 27]), "beyond 27"),
    (lambda v: change(v, f"{THINKER}.vision_config.num_heads", 7), "width that 4 divides"),
    (lambda v: change(v, f"{THINKER}.vision_config.out_hidden_size", 64), "the vision encoder gives 64"),
    (lambda v: change(v, f"{THINKER}.audio_config.n_window", 20), "13 tokens"),
    (lambda v: change(v, f"{THINKER}.audio_config.n_window_infer", 50), "shorter than a chunk"),
    (lambda v: change(v, "enable_audio_output", "no"), "enable_audio_output"),
    (lambda v: change(v, "talker_config"), "'talker_config' is missing; a Thinker alone states"),
    (lambda v: change(change(v, "enable_audio_output"), "code2wav_config", None), "'code2wav_config' is missing"),
    (lambda v: change(v, "thinker_config.audio_token_id"), "audio_token_id' is missing"),
    (lambda v: change(v, "talker_config.codec_bos_id"), "codec_bos_id' is missing"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_configurations_are_named(public: dict, wrong: Callable[[dict], dict], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OmniConfig.from_hf(wrong(public))


@pytest.mark.parametrize(
    "path, value",
    [
        ("talker_config.thinker_hidden_size", 1024),
        ("talker_config.num_code_groups", 15),
        ("talker_config.code_predictor_config.hidden_size", 512),
        ("talker_config.accept_hidden_layer", 49),
        ("talker_config.text_config.vocab_size", 4096),
        ("code2wav_config.codebook_size", 1024),
    ],
)
def test_parts_of_speech_that_do_not_fit_each_other(path: str, value: int, public: dict) -> None:
    with pytest.raises(ConfigError, match=r"talker_config\.\S+ is \d+"):
        OmniConfig.from_hf(change(public, path, value))
