"""The random checkpoints: the public layout, loadable by transformers, and sensitive to every structure."""

import gzip
import json
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from omni_jax.config import OmniConfig
from scripts.small.checkpoint import make_checkpoint
from scripts.small.configs import VARIANTS, config_dict
from scripts.small.tensors import tensor_shapes
from scripts.small.tokenizer import CHAT_TEMPLATE, ID_NAMES, SPECIAL_TOKENS, build_tokenizer

# Sizes that the architecture or the reference fixes, keys that mean nothing to the model, and ids that only happen to
# agree between two variants.
SHARED = {"in_channels", "in_chans", "layer_types"}
IRRELEVANT = {
    "image_size", "tokens_per_second", "conv_chunksize", "initializer_range", "router_aux_loss_coef", "codebook_dim",
    "semantic_codebook_size", "vector_quantization_hidden_dimension", "layer_scale_initial_scale", "max_window_layers",
    "num_semantic_quantizers", "attention_dropout", "dropout", "activation_dropout", "seconds_per_chunk",
}  # fmt: skip
MAY_AGREE = {"shared_expert_intermediate_size", "type", "rope_type", "decoder_sparse_step"}


def _numbers(config: dict, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a configuration with its path, the rotary settings under one spelling."""
    for key, value in config.items():
        if key in SHARED | IRRELEVANT | MAY_AGREE:
            continue
        if isinstance(value, dict) and key not in ("speaker_id",):
            inside = path if key in ("rope_scaling", "rope_parameters") else f"{path}.{key}"
            yield from _numbers(value, inside)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{path}.{key}", float(value)


def test_full_config_gives_the_public_tensors(data_dir):
    manifest = json.loads(gzip.decompress((data_dir / "tensor_manifest.json.gz").read_bytes()))
    shapes = {name: list(shape) for name, shape in tensor_shapes(config_dict("full")).items()}
    assert shapes == manifest["tensors"]


@pytest.mark.parametrize("variant", [*VARIANTS, "full"])
def test_our_reader_accepts_the_config(variant):
    config = OmniConfig.from_hf(config_dict(variant))
    if variant != "thinking":
        assert config.talker is not None and config.code2wav is not None
        assert config.talker.num_code_groups == config.code2wav.num_quantizers
    assert config.thinker.text.vocab_size >= (build_tokenizer(variant).get_vocab_size() if variant != "full" else 0)


@pytest.mark.parametrize("pair", list(combinations(("small", "odd", "full"), 2)) + [("small", "tiny"), ("odd", "tiny")])
def test_variants_differ_in_every_number(pair):
    first, second = (dict(_numbers(config_dict(v))) for v in pair)
    same = sorted(path for path in first.keys() & second.keys() if first[path] == second[path])
    assert not same


def test_reproducible_whatever_the_sharding(tmp_path):
    one, three = make_checkpoint(tmp_path / "a", "small", shards=1), make_checkpoint(tmp_path / "b", "small", shards=3)
    other = make_checkpoint(tmp_path / "c", "small", seed=1, shards=1)
    a, c = (load_file(path / "model-00001-of-00001.safetensors") for path in (one, other))
    index = json.loads((three / "model.safetensors.index.json").read_text())
    b = {k: v for name in sorted(set(index["weight_map"].values())) for k, v in load_file(three / name).items()}
    assert a.keys() == b.keys() == index["weight_map"].keys()
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in b.values())
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
        assert np.all(value != 0) and not np.array_equal(value, c[name])


def test_bfloat16_is_the_rounded_float32(tmp_path):
    path = make_checkpoint(tmp_path, "small", dtype="bfloat16", shards=1)
    values = load_file(path / "model-00001-of-00001.safetensors")["thinker.visual.pos_embed.weight"]
    exact = load_file(make_checkpoint(tmp_path / "f", "small", shards=1) / "model-00001-of-00001.safetensors")
    expected = exact["thinker.visual.pos_embed.weight"]
    assert values.dtype.name == "bfloat16" and np.abs(values.astype(np.float32) - expected).max() < 2**-7
    np.testing.assert_array_equal(values, expected.astype(values.dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenizer_has_the_ids_of_the_config(variant):
    tokenizer, config = build_tokenizer(variant), config_dict(variant)
    for section in (config, config["thinker_config"], config.get("talker_config", {})):
        for key, value in section.items():
            if key.removesuffix("_token_id") in ID_NAMES:
                token = ID_NAMES[key.removesuffix("_token_id")]
                assert tokenizer.encode(token).ids == [value], key
    assert all(len(tokenizer.encode(token).ids) == 1 for token in SPECIAL_TOKENS)
    text = "Ünïcode 中文 42 🦊\n\n  tail<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>user\n").tokens[1] == "user"


def test_a_given_tokenizer_is_used(tmp_path, data_dir):
    (tmp_path / "real.json").write_bytes(gzip.decompress((data_dir / "tokenizer.json.gz").read_bytes()))
    path = make_checkpoint(tmp_path / "ckpt", "small", tokenizer=tmp_path / "real.json")
    config, public = json.loads((path / "config.json").read_text()), config_dict("full")
    for key in ("im_start_token_id", "user_token_id", "assistant_token_id", "tts_eos_token_id"):
        assert config[key] == public[key]
    assert config["thinker_config"]["audio_token_id"] == public["thinker_config"]["audio_token_id"]
    assert config["thinker_config"]["text_config"]["vocab_size"] >= 151676


def _render(messages: list[dict], **options) -> str:
    from jinja2 import Environment

    return (
        Environment(extensions=["jinja2.ext.loopcontrols"])
        .from_string(CHAT_TEMPLATE)
        .render(messages=messages, **options)
    )


def test_chat_template_orders_media_and_text():
    parts = [{"type": kind} for kind in ("audio", "image", "video")] + [{"type": "text", "text": "Well?"}]
    text = _render(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|>"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>Well?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chat_template_writes_tools():
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Two."},
    ]
    text = _render(turns, tools=[{"name": "add"}])
    system, user, assistant, tool, last, end = text.split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n# Tools") and '<tools>\n{"name": "add"}\n</tools>' in system
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert assistant == f"<|im_start|>assistant\n{called}\n{called}"
    assert tool == ("<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>")
    assert user == "<|im_start|>user\n1+1?" and last == "<|im_start|>assistant\nTwo." and not end


@pytest.mark.parametrize("variant", ["tiny", "small", "odd"])
def test_transformers_loads_it_whole(variant, checkpoints):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, Qwen3OmniMoeForConditionalGeneration

    torch.set_num_threads(1)
    path = checkpoints(variant)
    model, report = Qwen3OmniMoeForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.thinker.lm_head.weight.std() > 0.1 and model.has_talker
    text = "<|im_start|>user\nWhat’s heard? 中文<|im_end|>\n"
    theirs = AutoTokenizer.from_pretrained(path)
    assert theirs(text).input_ids == Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("variant", ["tiny", "odd", "full"])
def test_a_config_means_the_same_as_transformers_saves_it(variant, tmp_path):
    from transformers import AutoConfig

    values = config_dict(variant)
    (tmp_path / "config.json").write_text(json.dumps(values))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "rope_theta" not in saved["code2wav_config"]
    assert OmniConfig.from_hf(saved) == OmniConfig.from_hf(values)


@pytest.mark.parametrize("variant", ["tiny", "small", "odd"])
def test_every_structure_moves_the_text_logits(variant, reference):
    torch = pytest.importorskip("torch")
    model = reference(variant).thinker
    ids = torch.arange(7, 47)[None]

    def logits():
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits

    base = logits()
    assert 15 < base.abs().max() < 35
    layers = model.model.language_model.layers
    sparse = next(layer for layer in layers if hasattr(layer.mlp, "experts"))
    for weight in (layers[1].self_attn.q_norm.weight, layers[1].self_attn.k_proj.weight, sparse.mlp.gate.weight):
        kept = weight.data.clone()
        weight.data.fill_(1.0 if weight.ndim == 1 else 0.0)
        assert (logits() - base).abs().max() > 1.0
        weight.data.copy_(kept)
    assert torch.equal(logits(), base)
