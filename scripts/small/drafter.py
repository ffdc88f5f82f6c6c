"""Write a small random drafter in its public layout, for one of the small random checkpoints.

    python -m scripts.small drafter DIR --variant tiny --kind dflash

The drafters of the three variants differ in everything in which the public ones differ: sliding and full attention,
more hidden states than layers, options at the top level and in their section, names with and without "model.", the
EAGLE-3 layer as `midlayer` and as `layers.0`, a part of the vocabulary and all of it. Weights are drawn like those of
the checkpoints, so that every structure changes the output.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scripts.small.checkpoint import draw
from scripts.small.configs import config_dict
from scripts.small.tokenizer import build_tokenizer

Shape = tuple[int, ...]
MASK = "<|fim_pad|>"

# What each drafter's config states besides what follows from its target. Not written: "names", the (prefix, EAGLE-3
# layer) of tensor names, and "shards", the number of files.
DRAFTERS: dict[tuple[str, str], dict] = {
    ("dflash", "tiny"): {
        "names": ("", ""), "shards": 1, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "intermediate_size": 192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None,
        "block_size": 8, "num_target_layers": 4, "sliding_window": None, "use_sliding_window": False,
        "dflash_config": {"target_layer_ids": [2, 0]},
    },
    ("dflash", "small"): {
        "names": ("model.", ""), "shards": 2, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 20, "intermediate_size": 72, "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "num_target_layers": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6,
        "use_sliding_window": True, "dflash_config": {"target_layer_ids": [0, 1, 3, 4], "block_size": 6},
    },
    ("dflash", "odd"): {
        "names": ("", ""), "shards": 1, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
        "head_dim": 36, "intermediate_size": 100, "rms_norm_eps": 1e-2, "rope_theta": 700.0, "block_size": 16,
        "rope_scaling": {"rope_type": "default", "mrope_section": [6, 6, 6]}, "num_target_layers": 7,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5, "use_sliding_window": True,
        "is_causal": False, "dflash_config": {},
    },
    ("eagle3", "tiny"): {
        "names": ("", "midlayer."), "shards": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 40,
        "intermediate_size": 200, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "draft_vocab_size": 300,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True},
    },
    ("eagle3", "small"): {
        "names": ("model.", "layers.0."), "shards": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
        "intermediate_size": 88, "rms_norm_eps": 1e-3, "rope_theta": 4000.0, "draft_vocab_size": 120,
        "eagle_aux_hidden_state_layer_ids": [4, 1, 2, 5], "own_embedding": True,
    },
    ("eagle3", "odd"): {
        "names": ("", "layers.0."), "shards": 1, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 28,
        "intermediate_size": 108, "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 600.0},
    },
}  # fmt: skip
UNWRITTEN = ("names", "shards", "own_embedding")


def make_drafter(directory: str | Path, variant: str, kind: str, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the drafter of `kind` for the checkpoint of `variant` to `directory` and return its path."""
    import ml_dtypes
    from safetensors.numpy import save_file

    if (kind, variant) not in DRAFTERS:
        raise ValueError(f"no {kind!r} drafter for {variant!r}; choose from {sorted(DRAFTERS)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    made, config = DRAFTERS[kind, variant], draft_config_dict(variant, kind)
    number = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    tensors = {name: _values(kind, name, shape, seed).astype(number) for name, shape in _shapes(kind, variant, config)}
    if kind == "eagle3" and config["draft_vocab_size"] < config["vocab_size"]:
        tensors |= _vocabulary(config, seed)
    tensors = {_public_name(made["names"], name): value for name, value in tensors.items()}
    (directory / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
    if made["shards"] == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(tensors)
    files = {f"model-{i + 1:05}-of-{made['shards']:05}.safetensors": names[i :: made["shards"]] for i in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return directory


def draft_config_dict(variant: str, kind: str) -> dict:
    """The `config.json` of a drafter, with its target's width and vocabulary."""
    text = config_dict(variant)["thinker_config"]["text_config"]
    config = {key: value for key, value in DRAFTERS[kind, variant].items() if key not in UNWRITTEN}
    shared = {
        "attention_bias": False, "hidden_act": "silu", "hidden_size": text["hidden_size"],
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "vocab_size": text["vocab_size"],
    }  # fmt: skip
    if kind == "dflash":
        mask = {"mask_token_id": build_tokenizer(variant).token_to_id(MASK)}
        own = {"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}
        return {**own, **shared, **config, "dflash_config": {**config["dflash_config"], **mask}}
    own = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
    return {**own, **shared, "draft_vocab_size": text["vocab_size"], **config}


def _shapes(kind: str, variant: str, c: dict) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every weight, under the layout's own names."""
    D = c["hidden_size"]
    layers = c["num_hidden_layers"]
    if kind == "dflash":
        yield "fc.weight", (D, len(c["dflash_config"].get("target_layer_ids", range(layers))) * D)
        yield "hidden_norm.weight", (D,)
        for i in range(layers):
            yield from _layer(f"layers.{i}.", c, D)
            for name in ("q_norm", "k_norm"):
                yield f"layers.{i}.self_attn.{name}.weight", (c["head_dim"],)
    else:
        yield "fc.weight", (D, len(c.get("eagle_aux_hidden_state_layer_ids", range(3))) * D)
        yield "midlayer.hidden_norm.weight", (D,)
        yield from _layer("midlayer.", c, 2 * D)
        yield "lm_head.weight", (c["draft_vocab_size"], D)
        if DRAFTERS[kind, variant].get("own_embedding"):
            yield "embed_tokens.weight", (c["vocab_size"], D)
    yield "norm.weight", (D,)


def _layer(p: str, c: dict, inner: int) -> Iterator[tuple[str, Shape]]:
    D, F, heads, kv = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    head = c.get("head_dim", D // heads)
    for name, out in (("q", heads), ("k", kv), ("v", kv)):
        yield f"{p}self_attn.{name}_proj.weight", (out * head, inner)
    yield f"{p}self_attn.o_proj.weight", (D, heads * head)
    for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        yield f"{p}mlp.{name}_proj.weight", shape
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{p}{name}.weight", (D,)


def _values(kind: str, name: str, shape: Shape, seed: int) -> np.ndarray:
    """The float32 values of one tensor, at the scale that the checkpoints give a tensor of its name."""
    part = "thinker." if name == "lm_head.weight" else ""
    return draw(f"{kind}.{part}{name}", shape, {}, seed)


def _vocabulary(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Which tokens the drafter knows: `d2t` offsets int64 [Vd], `t2d` bool [V]."""
    Vd, V = config["draft_vocab_size"], config["vocab_size"]
    tokens = np.sort(np.random.default_rng(seed).permutation(V)[:Vd])
    known = np.zeros(V, bool)
    known[tokens] = True
    return {"d2t": tokens - np.arange(Vd), "t2d": known}


def _public_name(names: tuple[str, str], name: str) -> str:
    prefix, layer = names
    if name in ("lm_head.weight", "d2t", "t2d"):
        return name
    return prefix + name.replace("midlayer.", layer)
