"""Configurations that cannot be true: of the model, of its media, of drafters, and the files that hold them."""

import json
from functools import reduce
from math import inf, nan
from pathlib import Path
from typing import Any

from omni_jax.config import OmniConfig
from omni_jax.draft_config import read_draft_config
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.inputs.settings import AudioSettings, ImageSettings, read_settings
from omni_jax.weights.drafters import load_drafter
from scripts.small.configs import PUBLIC_CONFIG, PUBLIC_DFLASH
from scripts.small.drafter import draft_config_dict
from tests.bad_inputs.case import Case

PREPROCESSOR = PUBLIC_CONFIG.parent / "public_preprocessor_config.json"
ABSENT = object()
TEXT, VISION, AUDIO = (f"thinker_config.{name}_config" for name in ("text", "vision", "audio"))
TALKER, PREDICTOR, VOCODER = "talker_config", "talker_config.code_predictor_config", "code2wav_config"


def _changed(values: dict, changes: dict[str, Any]) -> dict:
    values = json.loads(json.dumps(values))
    for path, value in changes.items():
        *parents, last = path.split(".")
        section = reduce(lambda section, name: section[name], parents, values)
        section.pop(last) if value is ABSENT else section.update({last: value})
    return values


def _model(name: str, changes: dict[str, Any], *words: str) -> Case:
    def act(*_: Any) -> None:
        OmniConfig.from_hf(_changed(json.loads(PUBLIC_CONFIG.read_text()), changes))

    return Case(f"config: {name}", act, ("config.json", *words), ConfigError)


def _media(name: str, changes: dict[str, Any], *words: str) -> Case:
    def act(*_: Any) -> None:
        values = _changed(json.loads(PREPROCESSOR.read_text()), changes)
        ImageSettings.from_hf(values), AudioSettings.from_hf(values)

    return Case(f"preprocessor: {name}", act, ("preprocessor_config.json", *changes, *words), ConfigError)


def _draft(name: str, values: dict, changes: dict[str, Any], *words: str) -> Case:
    return Case(
        f"drafter: {name}",
        lambda *_: read_draft_config(_changed(values, changes), "drafter/config.json"),
        ("drafter/config.json", *words),
        ConfigError,
    )


def _file(name: str, data: bytes | None, *words: str) -> Case:
    def act(folder: Path, _: Any) -> None:
        if data is not None:
            (folder / "config.json").write_bytes(data)
        load_drafter(folder)

    return Case(f"drafter's file: {name}", act, ("config.json", *words), ConfigError)


def _index(folder: Path, weight_map: Any) -> None:
    (folder / "config.json").write_text(json.dumps(PUBLIC_DFLASH))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    load_drafter(folder)


EAGLE3 = draft_config_dict("tiny", "eagle3")
TARGETS = "dflash_config.target_layer_ids"
CASES = [
    # Numbers of another type, or of none.
    _model("rms_norm_eps NaN", {f"{TEXT}.rms_norm_eps": nan}, f"{TEXT}.rms_norm_eps", "nan", "to 0.1"),
    _model("rms_norm_eps infinite", {f"{VOCODER}.rms_norm_eps": inf}, "rms_norm_eps", "inf"),
    _model("rms_norm_eps negative", {f"{TEXT}.rms_norm_eps": -1}, "rms_norm_eps", "-1"),
    _model("rms_norm_eps zero", {f"{PREDICTOR}.rms_norm_eps": 0}, f"{PREDICTOR}.rms_norm_eps", "is 0"),
    _model("rms_norm_eps huge", {f"{TEXT}.rms_norm_eps": 10**400}, "rms_norm_eps", "401 characters"),
    _model("rope_theta zero", {f"{TEXT}.rope_theta": 0}, f"{TEXT}.rope_theta", "from 10"),
    _model("rope_theta NaN", {f"{TALKER}.text_config.rope_theta": nan}, "text_config.rope_theta", "nan"),
    _model("rope_theta true", {f"{TEXT}.rope_theta": True}, "rope_theta", "True"),
    _model("rope_theta text", {f"{TEXT}.rope_theta": "1e6"}, "rope_theta", "'1e6'"),
    _model("rope_scaling a name", {f"{TEXT}.rope_scaling": "yarn"}, "rope_scaling", "'yarn'", "section"),
    _model("rope_scaling a list", {f"{TEXT}.rope_scaling": [1]}, "rope_scaling", "[1]", "section"),
    _model("rope_parameters a number", {f"{TEXT}.rope_parameters": 5}, f"{TEXT}.rope_parameters", "5", "section"),
    _model("a theta inside of NaN", {f"{TEXT}.rope_parameters": {"rope_theta": nan}}, "rope_parameters.rope_theta"),
    _model("a type that is a list", {f"{TEXT}.rope_parameters": {"type": ["yarn"]}}, "rope type ['yarn']", "default"),
    _model("mrope_section text", {f"{TEXT}.rope_scaling.mrope_section": ["a"]}, "mrope_section", "['a']", "3 numbers"),
    _model("mrope_section of two", {f"{TEXT}.rope_scaling.mrope_section": [32, 32]}, "[32, 32]", "3 numbers"),
    _model("mrope_section halves", {f"{TEXT}.rope_scaling.mrope_section": [24, 20.5, 19.5]}, "20.5", "all whole"),
    _model("mrope_section with zero", {f"{TEXT}.rope_scaling.mrope_section": [64, 0, 0]}, "[64, 0, 0]", "from 1"),
    _model("Talker without mrope_section", {f"{TALKER}.text_config.rope_scaling": None}, "mrope_section", "missing"),
    _model("a head of odd size", {f"{PREDICTOR}.head_dim": 127}, PREDICTOR, "127", "pairs"),
    _model("a whole number with a point", {f"{TEXT}.num_hidden_layers": 48.0}, "num_hidden_layers", "48.0", "int"),
    _model("a size that is a list", {f"{VISION}.hidden_size": [1152]}, f"{VISION}.hidden_size", "[1152]"),
    _model("a flag that is text", {"thinker_config.tie_word_embeddings": "no"}, "tie_word_embeddings", "'no'", "bool"),
    _model("speech neither true nor false", {"enable_audio_output": "no"}, "enable_audio_output", "'no'", "bool"),
    _model("null for a section", {f"{AUDIO}": None}, f"'{AUDIO}'", "missing"),
    _model("a value of a megabyte", {f"{TEXT}.hidden_size": "x" * 10**6}, "hidden_size", "1,000,002 characters"),
    # Sizes without bounds.
    _model("10^9 layers", {f"{TEXT}.num_hidden_layers": 10**9}, "num_hidden_layers", "at most 2,000"),
    _model("10^6 experts", {f"{TEXT}.num_experts": 10**6}, TEXT, "500,000 experts"),
    _model("10^12 tokens", {f"{TEXT}.vocab_size": 10**12}, "vocab_size", "at most"),
    _model("an encoder 10^9 deep", {f"{VISION}.depth": 10**9}, f"{VISION}.depth", "at most 2,000"),
    _model("a window of 10^9 frames", {f"{VOCODER}.sliding_window": 10**9}, "sliding_window", "at most"),
    _model("10^10 position embeddings", {f"{VISION}.num_position_embeddings": 10**10}, "num_position_embeddings"),
    _model("an upsample rate of 0", {f"{VOCODER}.upsample_rates": [8, 0]}, "upsample_rates", "[8, 0]", "from 1"),
    _model("no upsample rates", {f"{VOCODER}.upsample_rates": []}, "upsample_rates is an empty list"),
    _model("no ratios", {f"{VOCODER}.upsampling_ratios": []}, "upsampling_ratios is an empty list"),
    _model("a negative ratio", {f"{VOCODER}.upsampling_ratios": [2, -2]}, "upsampling_ratios", "[2, -2]"),
    _model("10^12 samples per frame", {f"{VOCODER}.upsample_rates": [1000] * 4}, "upsample_rates", "100,000 samples"),
    _model("more halves than channels", {f"{VOCODER}.decoder_dim": 15}, "decoder_dim", "halved 4 times"),
    _model("positions per second 0", {"thinker_config.position_id_per_seconds": 0}, "position_id_per_seconds", "is 0"),
    _model("positions per second inf", {f"{TALKER}.position_id_per_seconds": inf}, "position_id_per_seconds", "inf"),
    # Numbers that do not fit each other.
    _model("deepstack thrice after one layer", {f"{VISION}.deepstack_visual_indexes": [0, 0, 0]}, "(0, 0, 0)", "twice"),
    _model("deepstack below zero", {f"{VISION}.deepstack_visual_indexes": [-1]}, "deepstack_visual_indexes", "[-1]"),
    _model(
        "more deepstack features than layers",
        {f"{TEXT}.num_hidden_layers": 2, f"{TALKER}.accept_hidden_layer": 1},
        "3 deepstack_visual_indexes",
        "2 layers",
    ),
    _model("audio width and heads", {f"{AUDIO}.encoder_attention_heads": 19}, AUDIO, "1280", "19 heads"),
    _model("audio without positions", {f"{AUDIO}.max_source_positions": 12}, "max_source_positions", "13"),
    _model("four channels", {f"{VISION}.in_channels": 4}, f"{VISION}.in_channels", "from 3 to 3"),
    _model("pictures turned otherwise", {f"{VISION}.rope_parameters": {"rope_theta": 100}}, "rope_theta", "10000"),
    _model("a Talker without experts", {f"{TALKER}.text_config.num_experts": 0}, "num_experts", "missing"),
    _model("a window in the code predictor", {f"{PREDICTOR}.layer_types": ["sliding_attention"]}, "layer_types"),
    _model("an image token beyond", {"thinker_config.image_token_id": 152064}, "image_token_id", "0 to 152063"),
    _model("a negative token", {"im_end_token_id": -1}, "im_end_token_id", "is -1"),
    _model("turns begin as they end", {"im_end_token_id": 151644}, "im_start_token_id", "im_end_token_id", "both"),
    _model(
        "one token for image and video",
        {"thinker_config.video_token_id": 151655},
        "thinker_config.video_token_id and thinker_config.image_token_id",
        "151655",
    ),
    _model("another token in the Talker", {f"{TALKER}.audio_token_id": 7}, TALKER, "audio_token_id is 7", "151675"),
    _model("another user in the Thinker", {"thinker_config.user_token_id": 873}, "user_token_id is 873", "872"),
    _model("another merge in the Talker", {f"{TALKER}.spatial_merge_size": 4}, "spatial_merge_size is 4"),
    _model("code groups twice", {f"{PREDICTOR}.num_code_groups": 8}, PREDICTOR, "num_code_groups is 8", "16"),
    _model("two codec marks of one id", {f"{TALKER}.codec_pad_id": 2150}, "codec_eos_token_id", "codec_pad_id"),
    _model("a codec mark among the sounds", {f"{TALKER}.codec_bos_id": 2047}, "codec_bos_id is 2047", "2048 to 3071"),
    _model("a voice beyond the codec", {f"{TALKER}.speaker_id.ethan": 3072}, "speaker_id.ethan is 3072", "3071"),
    _model("a voice that is a mark", {f"{TALKER}.speaker_id.ethan": 2150}, "speaker_id.ethan", "codec_eos_token_id"),
    _model("a voice without an id", {f"{TALKER}.speaker_id": {"ethan": None}}, "speaker_id.ethan", "None"),
    _model("voices that differ in case", {f"{TALKER}.speaker_id.Ethan": 2301}, "speaker_id", "'ethan'", "case"),
    _model("a voice without a name", {f"{TALKER}.speaker_id": {" ": 2301}}, "speaker_id", "nobody can write"),
    _model("a voice that colours terminals", {f"{TALKER}.speaker_id": {"\x1b[1m": 2301}}, "speaker_id", "nobody can"),
    _model("no voices", {f"{TALKER}.speaker_id": {}}, "speaker_id", "no voice"),
    _media("a mean of 400 digits", {"image_mean": [0.5, 10**400, 0.5]}, "3 numbers"),
    _media("a mean that is NaN", {"image_mean": [nan] * 3}, "nan", "3 numbers"),
    _media("a deviation that is NaN", {"image_std": [0.5, nan, 0.5]}, "nan", "from 0.01"),
    _media("a deviation of 0", {"image_std": [0, 0, 0]}, "from 0.01"),
    _media("a negative deviation", {"image_std": [-0.5] * 3}, "-0.5"),
    _media("a true mean", {"image_mean": [True] * 3}, "True"),
    _media("a hop of 10^9", {"hop_length": 10**9}, "1000000000"),
    _media("a window of one sample", {"n_fft": 1}, "is 1"),
    _media("a window shorter than its hop", {"hop_length": 401}, "401", "n_fft 400"),
    _media("more bins than frequencies", {"feature_size": 201}, "n_fft 400", "201"),
    _media("limits exchanged", {"min_pixels": 3137, "max_pixels": 3136}, "3137"),
    _media("no room for one token", {"patch_size": 1000, "merge_size": 10}, "100000000 pixels"),
    _media("pictures blown up to 10^12", {"min_pixels": 10**12}, "at most"),
    _media("another scale of pixels", {"rescale_factor": 1}, "0.0039"),
    _media("patches of 10^9", {"patch_size": 10**9}, "at most"),
    _draft("10^9 tokens in a block", PUBLIC_DFLASH, {"block_size": 10**9}, "block_size", "from 2 to"),
    _draft("a block of NaN", PUBLIC_DFLASH, {"block_size": nan}, "block_size", "nan"),
    _draft("a mask beyond", PUBLIC_DFLASH, {"dflash_config.mask_token_id": 152064}, "mask_token_id", "152,063"),
    _draft("a layer twice", PUBLIC_DFLASH, {TARGETS: [1, 1]}, "target_layer_ids", "[1, 1]", "different"),
    _draft("a layer beyond", PUBLIC_DFLASH, {TARGETS: [48]}, "target_layer_ids", "48", "different layers"),
    _draft("half a layer", PUBLIC_DFLASH, {TARGETS: [1.5]}, "target_layer_ids", "1.5", "all whole"),
    _draft("10^9 layers", PUBLIC_DFLASH, {"num_hidden_layers": 10**9}, "num_hidden_layers", "at most"),
    _draft("rope_theta NaN", PUBLIC_DFLASH, {"rope_theta": nan}, "rope_theta", "nan"),
    _draft("rope_scaling a name", PUBLIC_DFLASH, {"rope_scaling": "yarn"}, "rope_scaling", "'yarn'"),
    _draft("a window that is text", PUBLIC_DFLASH, {"use_sliding_window": "no"}, "use_sliding_window", "'no'"),
    _draft("true for a neutral factor", PUBLIC_DFLASH, {"output_multiplier": True}, "output_multiplier", "True"),
    _draft("a part of the rotation", PUBLIC_DFLASH, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    _draft("a vocabulary of nothing", EAGLE3, {"draft_vocab_size": 0}, "draft_vocab_size", "is 0"),
    _draft("true layers", EAGLE3, {"num_hidden_layers": True}, "num_hidden_layers", "True"),
    _draft("states of 10^9", EAGLE3, {"eagle_config.eagle_aux_hidden_state_layer_ids": [10**9]}, "eagle_aux_hidden"),
    _draft("rms_norm_eps negative", EAGLE3, {"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    _file("missing", None, "is missing", "take it from the checkpoint itself"),
    _file("nested too deep", b'{"a":' + b"[" * 10**5, "nested too deep"),
    _file("a list", b"[]", "no JSON object"),
    _file("a number of 5,000 digits", b'{"block_size": ' + b"9" * 5000 + b"}", "5000 digits"),
    Case("drafter's file: no path", lambda *_: load_drafter(4), ("the drafter", "int"), InputError),  # type: ignore[arg-type]
    Case("drafter's index: not names", lambda folder, _: _index(folder, [1]), ("weight_map",), CheckpointError),
    Case(
        "drafter's index: a name too long",
        lambda folder, _: _index(folder, {"a": "a" * 300 + ".safetensors"}),
        ("is missing", "download"),
        CheckpointError,
    ),
    Case(
        "preprocessor: missing",
        lambda folder, _: read_settings(folder),
        ("preprocessor_config.json", "copy it"),
        CheckpointError,
    ),
]
