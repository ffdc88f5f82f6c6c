"""Write a small random Qwen3-Omni checkpoint in the Hugging Face layout, with NumPy, safetensors and tokenizers only.

    python -m scripts.small checkpoint DIR --variant tiny

The directory holds what the public checkpoint's does (config.json, safetensors shards with their index, tokenizer, chat
template, preprocessor settings) under the public on-disk names, one tensor per expert, and transformers loads it too.

The weights are random but not at initialisation scale: at that scale a wrong attention window or a dropped position
embedding moves the output less than a test can see. Here attention is peaked, routers are decided, every bias, norm
weight and layer scale is away from its neutral value, and logits reach 15 to 30. Each tensor is drawn from its own
name, so that neither sharding nor the order of tensors changes a value.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np

from scripts.small.configs import VARIANTS, config_dict
from scripts.small.tensors import Shape, tensor_shapes
from scripts.small.tokenizer import CHAT_TEMPLATE, THINKING_TEMPLATE, build_tokenizer, read_tokenizer, write_tokenizer

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
    tok = build_tokenizer(variant) if tokenizer is None else read_tokenizer(tokenizer)
    config = config_dict(variant, tok)
    config["dtype"] = config["thinker_config"]["dtype"] = dtype
    write_tokenizer(directory, tok, THINKING_TEMPLATE if variant == "thinking" else CHAT_TEMPLATE)
    _write_json(directory / "config.json", config)
    _write_json(directory / "preprocessor_config.json", preprocessor_dict(config))
    _write_json(directory / "generation_config.json", GENERATION_CONFIG)
    _write_weights(directory, config, seed, dtype, shards)
    return directory


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
