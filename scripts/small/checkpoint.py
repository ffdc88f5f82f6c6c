"""Write a small random Qwen3-Omni checkpoint in the Hugging Face layout, with NumPy, safetensors and tokenizers only.

    python -m scripts.small.checkpoint DIR --variant tiny

The directory holds what the public checkpoint's does (config.json, safetensors shards with their index, tokenizer, chat
template, preprocessor settings) under the public on-disk names, one tensor per expert, and transformers loads it too.

The weights are random but not at initialisation scale: at that scale a wrong attention window or a dropped position
embedding moves the output less than a test can see. Here attention is peaked, routers are decided, every bias, norm
weight and layer scale is away from its neutral value, and logits reach 15 to 30. Each tensor is drawn from its own
name, so that neither sharding nor the order of tensors changes a value.
"""

import argparse
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scripts.small.configs import VARIANTS, config_dict
from scripts.small.tokenizer import CHAT_TEMPLATE, THINKING_TEMPLATE, build_tokenizer, tokenizer_config

Shape = tuple[int, ...]

GENERATION_CONFIG = {
    "talker_max_new_tokens": 4096,
    "talker_repetition_penalty": 1.05,
    "talker_temperature": 0.9,
    "talker_top_k": 50,
    "talker_top_p": 1.0,
}
MAX_PIXELS = 448 * 448

# First match wins: (pattern, mean, standard deviation, kind). Kind "plain" draws mean + std * normal; "fan_in" divides
# the standard deviation by the square root of the inputs that one output sums, which makes it the layer's gain.
SCALES: tuple[tuple[str, float, float, str], ...] = (
    (r"\.[qk]_norm\.weight$", 1.6, 0.2, "plain"),
    (r"code2wav\.decoder\.\d+\.conv\.bias$", 0.0, 0.05, "plain"),
    (r"code2wav\.decoder\.(0\.conv|\d+\.block\..*conv)\.weight$", 0.0, 0.6, "fan_in"),
    (r"code2wav\.decoder\.\d+\.conv\.weight$", 0.0, 0.15, "fan_in"),
    (r"layer_scale\.scale$|\.gamma$", 0.5, 0.15, "plain"),
    (r"\.(alpha|beta)$", 0.0, 0.3, "plain"),
    (r"code_embedding\.weight$", 0.0, 2.0, "plain"),
    (r"(embed_tokens|codec_embedding(\.\d+)?)\.weight$", 0.0, 0.7, "plain"),
    (r"pos_embed\.weight$", 0.0, 0.7, "plain"),
    (r"(norm|norm1|norm2|layernorm|layer_norm|ln_q|ln_post)\.weight$", 1.0, 0.2, "plain"),
    (r"\.bias$", 0.0, 0.2, "plain"),
    (r"mlp\.gate\.weight$", 0.0, 2.0, "fan_in"),
    (r"shared_expert_gate\.weight$", 0.0, 2.0, "fan_in"),
    (r"thinker\.lm_head\.weight$", 0.0, 5.0, "fan_in"),
    (r"(codec_head|lm_head\.\d+)\.weight$", 0.0, 4.0, "fan_in"),
    (r"conv2d\d\.weight$|dwconv\.conv\.weight$|patch_embed\.proj\.weight$", 0.0, 1.4, "fan_in"),
    (r"\.[qk]_proj\.weight$|attn\.qkv\.weight$", 0.0, 1.3, "fan_in"),
    (r"experts?\.(\d+\.)?\w+_proj\.weight$|mlp\.\w+_proj\.weight$", 0.0, 1.3, "fan_in"),
    (r"weight$", 0.0, 1.0, "fan_in"),
)


def make_checkpoint(
    directory: str | Path,
    variant: str,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 2,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write the checkpoint of `variant` to `directory` and return its path; `tokenizer`: a tokenizer.json to use."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} does not exist; choose from {list(VARIANTS)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tok = build_tokenizer(variant) if tokenizer is None else _read_tokenizer(tokenizer)
    config = config_dict(variant, tok)
    config["dtype"] = config["thinker_config"]["dtype"] = dtype
    tok.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(THINKING_TEMPLATE if variant == "thinking" else CHAT_TEMPLATE)
    _write_json(directory / "tokenizer_config.json", tokenizer_config(tok))
    _write_json(directory / "config.json", config)
    _write_json(directory / "preprocessor_config.json", preprocessor_dict(config))
    _write_json(directory / "generation_config.json", GENERATION_CONFIG)
    _write_weights(directory, config, seed, dtype, shards)
    return directory


def _read_tokenizer(path: str | Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def preprocessor_dict(config: dict) -> dict:
    """The `preprocessor_config.json` that agrees with a config: log-mel settings, patch sizes, pixel limits."""
    vision, audio = config["thinker_config"]["vision_config"], config["thinker_config"]["audio_config"]
    return {
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": audio["num_mel_bins"],
        "hop_length": 160,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_pixels": MAX_PIXELS,
        "merge_size": vision["spatial_merge_size"],
        "min_pixels": 3136,
        "n_fft": 400,
        "n_samples": 4800000,
        "nb_max_frames": 30000,
        "padding_side": "right",
        "padding_value": 0.0,
        "patch_size": vision["patch_size"],
        "processor_class": "Qwen3OmniMoeProcessor",
        "return_attention_mask": True,
        "sampling_rate": 16000,
        "temporal_patch_size": vision["temporal_patch_size"],
    }


def _write_weights(directory: Path, config: dict, seed: int, dtype: str, shards: int) -> None:
    """Draw every tensor and write it to one of `shards` files of about equal size, with the index that names them."""
    import ml_dtypes
    from safetensors.numpy import save_file

    kind = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    shapes = tensor_shapes(config)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    files: list[dict[str, np.ndarray]] = [{} for _ in range(shards)]
    weight_map, done = {}, 0
    for name, shape in shapes.items():
        shard = min(done * shards // total, shards - 1)
        files[shard][name] = draw(name, shape, config, seed).astype(kind)
        weight_map[name] = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        done += int(np.prod(shape))
    for i, tensors in enumerate(files):
        save_file(tensors, directory / f"model-{i + 1:05d}-of-{shards:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total * kind.itemsize}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def draw(name: str, shape: Shape, config: dict, seed: int) -> np.ndarray:
    """The float32 values of one tensor: normal, at the scale that `SCALES` gives its name."""
    mean, std, kind = next((m, s, k) for pattern, m, s, k in SCALES if re.search(pattern, name))
    if name == "thinker.model.embed_tokens.weight" and config["thinker_config"].get("tie_word_embeddings"):
        std, kind = 5.0, "fan_in"
    if kind == "fan_in":
        std /= np.sqrt(np.prod(shape[1:]) if not _is_transposed(name) else shape[0])
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = mean + std * rng.standard_normal(shape, dtype=np.float32)
    if name == "talker.codec_head.weight":
        # Random speech would otherwise end at any frame, the first included.
        values[config["talker_config"]["codec_eos_token_id"]] *= 0.05
    return values.astype(np.float32)


def _is_transposed(name: str) -> bool:
    """Whether a tensor is a transposed convolution's, laid out (in, out, kernel)."""
    return bool(re.search(r"upsample\.\d+\.0\.conv\.weight$|decoder\.\d+\.block\.1\.conv\.weight$", name))


def tensor_shapes(config: dict) -> dict[str, Shape]:
    """Name and shape of every tensor on disk, in the order of the sub-models."""
    speech = (_talker, _code_predictor, _code2wav) if config["enable_audio_output"] else ()
    return {name: shape for part in (_audio, _vision, _thinker_text, *speech) for name, shape in part(config)}


Tensors = Iterator[tuple[str, Shape]]


def _linear(name: str, out: int, inner: int, bias: bool = True) -> Tensors:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Tensors:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _conv(name: str, *shape: int, out: int | None = None) -> Tensors:
    yield f"{name}.weight", shape
    yield f"{name}.bias", (shape[0] if out is None else out,)


def _audio(config: dict) -> Tensors:
    a, p = config["thinker_config"]["audio_config"], "thinker.audio_tower"
    width, channels, mel = a["d_model"], a["downsample_hidden_size"], a["num_mel_bins"]
    for i, inner in enumerate((1, channels, channels), start=1):
        yield from _conv(f"{p}.conv2d{i}", channels, inner, 3, 3)
        mel = (mel + 1) // 2
    yield from _linear(f"{p}.conv_out", width, channels * mel, bias=False)
    for i in range(a["encoder_layers"]):
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{p}.layers.{i}.self_attn.{proj}", width, width)
        yield from _norm(f"{p}.layers.{i}.self_attn_layer_norm", width)
        yield from _norm(f"{p}.layers.{i}.final_layer_norm", width)
        yield from _linear(f"{p}.layers.{i}.fc1", a["encoder_ffn_dim"], width)
        yield from _linear(f"{p}.layers.{i}.fc2", width, a["encoder_ffn_dim"])
    yield from _norm(f"{p}.ln_post", width)
    yield from _linear(f"{p}.proj1", width, width)
    yield from _linear(f"{p}.proj2", a["output_dim"], width)


def _vision(config: dict) -> Tensors:
    v, p = config["thinker_config"]["vision_config"], "thinker.visual"
    width, patch, merged = v["hidden_size"], v["patch_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    yield from _conv(f"{p}.patch_embed.proj", width, v["in_channels"], v["temporal_patch_size"], patch, patch)
    yield f"{p}.pos_embed.weight", (v["num_position_embeddings"], width)
    for i in range(v["depth"]):
        block = f"{p}.blocks.{i}"
        yield from _norm(f"{block}.norm1", width)
        yield from _norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(f"{block}.attn.proj", width, width)
        yield from _linear(f"{block}.mlp.linear_fc1", v["intermediate_size"], width)
        yield from _linear(f"{block}.mlp.linear_fc2", width, v["intermediate_size"])
    taps = [f"{p}.merger_list.{i}" for i in range(len(v["deepstack_visual_indexes"]))]
    for merger, normed in [(f"{p}.merger", width), *((tap, merged) for tap in taps)]:
        yield from _norm(f"{merger}.ln_q", normed)
        yield from _linear(f"{merger}.mlp.0", merged, merged)
        yield from _linear(f"{merger}.mlp.2", v["out_hidden_size"], merged)


def _attention(p: str, c: dict, qk_norm: bool = True) -> Tensors:
    width, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    head = c.get("head_dim", width // heads)
    for proj, out in (("q_proj", heads * head), ("k_proj", kv * head), ("v_proj", kv * head)):
        yield from _linear(f"{p}.self_attn.{proj}", out, width, bias=False)
    yield from _linear(f"{p}.self_attn.o_proj", width, heads * head, bias=False)
    if qk_norm:
        yield f"{p}.self_attn.q_norm.weight", (head,)
        yield f"{p}.self_attn.k_norm.weight", (head,)
    yield f"{p}.input_layernorm.weight", (width,)
    yield f"{p}.post_attention_layernorm.weight", (width,)


def _mlp(p: str, width: int, inner: int) -> Tensors:
    yield from _linear(f"{p}.gate_proj", inner, width, bias=False)
    yield from _linear(f"{p}.up_proj", inner, width, bias=False)
    yield from _linear(f"{p}.down_proj", width, inner, bias=False)


def _experts(p: str, c: dict) -> Tensors:
    yield f"{p}.gate.weight", (c["num_experts"], c["hidden_size"])
    for e in range(c["num_experts"]):
        yield from _mlp(f"{p}.experts.{e}", c["hidden_size"], c["moe_intermediate_size"])


def _thinker_text(config: dict) -> Tensors:
    thinker, p = config["thinker_config"], "thinker.model"
    c = thinker["text_config"]
    yield f"{p}.embed_tokens.weight", (c["vocab_size"], c["hidden_size"])
    for i in range(c["num_hidden_layers"]):
        yield from _attention(f"{p}.layers.{i}", c)
        if i in c["mlp_only_layers"] or (i + 1) % c["decoder_sparse_step"]:
            yield from _mlp(f"{p}.layers.{i}.mlp", c["hidden_size"], c["intermediate_size"])
        else:
            yield from _experts(f"{p}.layers.{i}.mlp", c)
    yield f"{p}.norm.weight", (c["hidden_size"],)
    if not thinker.get("tie_word_embeddings"):
        yield "thinker.lm_head.weight", (c["vocab_size"], c["hidden_size"])


def _talker(config: dict) -> Tensors:
    talker, p = config["talker_config"], "talker.model"
    c, outer = talker["text_config"], talker["thinker_hidden_size"]
    width = c["hidden_size"]
    for projection in ("text_projection", "hidden_projection"):
        yield from _linear(f"talker.{projection}.linear_fc1", c["intermediate_size"], outer)
        yield from _linear(f"talker.{projection}.linear_fc2", width, c["intermediate_size"])
    yield f"{p}.codec_embedding.weight", (c["vocab_size"], width)
    for i in range(c["num_hidden_layers"]):
        layer = f"{p}.layers.{i}"
        yield from _attention(layer, c)
        yield from _experts(f"{layer}.mlp", c)
        yield from _mlp(f"{layer}.mlp.shared_expert", width, c["shared_expert_intermediate_size"])
        yield f"{layer}.mlp.shared_expert_gate.weight", (1, width)
    yield f"{p}.norm.weight", (width,)
    yield "talker.codec_head.weight", (c["vocab_size"], width)


def _code_predictor(config: dict) -> Tensors:
    c, p = config["talker_config"]["code_predictor_config"], "talker.code_predictor"
    for i in range(c["num_code_groups"] - 1):
        yield f"{p}.model.codec_embedding.{i}.weight", (c["vocab_size"], c["hidden_size"])
        yield f"{p}.lm_head.{i}.weight", (c["vocab_size"], c["hidden_size"])
    for i in range(c["num_hidden_layers"]):
        yield from _attention(f"{p}.model.layers.{i}", c)
        yield from _mlp(f"{p}.model.layers.{i}.mlp", c["hidden_size"], c["intermediate_size"])
    yield f"{p}.model.norm.weight", (c["hidden_size"],)


def _code2wav(config: dict) -> Tensors:
    c, p = config["code2wav_config"], "code2wav"
    width = c["hidden_size"]
    yield f"{p}.code_embedding.weight", (c["num_quantizers"] * c["codebook_size"], width)
    for i in range(c["num_hidden_layers"]):
        layer = f"{p}.pre_transformer.layers.{i}"
        yield from _attention(layer, c, qk_norm=False)
        yield from _mlp(f"{layer}.mlp", width, c["intermediate_size"])
        yield f"{layer}.self_attn_layer_scale.scale", (width,)
        yield f"{layer}.mlp_layer_scale.scale", (width,)
    yield f"{p}.pre_transformer.norm.weight", (width,)
    for i, factor in enumerate(c["upsampling_ratios"]):
        stage = f"{p}.upsample.{i}"
        yield from _conv(f"{stage}.0.conv", width, width, factor)
        yield from _conv(f"{stage}.1.dwconv.conv", width, 1, 7)
        yield from _norm(f"{stage}.1.norm", width)
        yield from _linear(f"{stage}.1.pwconv1", 4 * width, width)
        yield from _linear(f"{stage}.1.pwconv2", width, 4 * width)
        yield f"{stage}.1.gamma", (width,)
    yield from _waveform_decoder(f"{p}.decoder", c)


def _waveform_decoder(p: str, c: dict) -> Tensors:
    width, rates = c["decoder_dim"], c["upsample_rates"]
    yield from _conv(f"{p}.0.conv", width, c["hidden_size"], 7)
    for i, rate in enumerate(rates, start=1):
        block, inner, width = f"{p}.{i}.block", width, width // 2
        yield from _snake(f"{block}.0", inner)
        yield from _conv(f"{block}.1.conv", inner, width, 2 * rate, out=width)
        for unit in (f"{block}.{j}" for j in (2, 3, 4)):
            yield from _snake(f"{unit}.act1", width)
            yield from _conv(f"{unit}.conv1.conv", width, width, 7)
            yield from _snake(f"{unit}.act2", width)
            yield from _conv(f"{unit}.conv2.conv", width, width, 1)
    yield from _snake(f"{p}.{len(rates) + 1}", width)
    yield from _conv(f"{p}.{len(rates) + 2}.conv", 1, width, 7)


def _snake(p: str, width: int) -> Tensors:
    yield f"{p}.alpha", (width,)
    yield f"{p}.beta", (width,)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write a small random Qwen3-Omni checkpoint in the Hugging Face layout."
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shards", type=int, default=2, help="number of safetensors files")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of the variant's own")
    args = parser.parse_args()
    path = make_checkpoint(args.directory, args.variant, args.seed, args.dtype, args.shards, args.tokenizer)
    print(f"{args.variant} checkpoint with random weights in {path}")


if __name__ == "__main__":
    main()
