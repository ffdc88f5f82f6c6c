"""A small target: a Thinker of four plain layers that learns questions and answers, as a Hugging Face directory.

Its encoders are there and random; only text is learned. The tokenizer is trained on the same text.
"""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.models.param import bind, declare, init_params
from omni_jax.models.thinker import Thinker
from omni_jax.train.objective import Loss
from omni_jax.weights.keymap import table
from omni_jax.weights.trees import flatten
from scripts.drafted.fit import fit
from scripts.small.checkpoint import GENERATION_CONFIG, preprocessor_dict
from scripts.small.configs import config_dict
from scripts.small.tokenizer import SPECIAL_TOKENS, train_tokenizer, write_tokenizer

VOCABULARY = 512
TEXT = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 384, "vocab_size": VOCABULARY, "mlp_only_layers": [0, 1, 2, 3], "rope_theta": 10000.0,
    "rope_scaling": {"mrope_section": [6, 5, 5]}, "max_position_embeddings": 2048,
}  # fmt: skip
ROWS, LENGTH = 8, 160


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Question and answer of each line of a JSON Lines file, gzipped or not."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["question"], row["answer"]) for row in rows]


def make_target(directory: Path, pairs: list[tuple[str, str]], seconds: float, steps: int) -> None:
    """Train the target on `pairs` for at most `seconds` and `steps`, and write it to `directory`."""
    tokenizer = _tokenizer(pairs)
    config = _config(tokenizer)
    parsed = OmniConfig.from_hf(config)
    declaration = declare(Thinker, parsed.thinker)
    params = init_params(Thinker, parsed.thinker)
    params["embed"] = params["embed"] * 0.05
    encoders = {name: params.pop(name) for name in ("vision", "audio")}
    stream = _stream(tokenizer, pairs)

    def batch_of(step: int) -> np.ndarray:
        start = np.random.default_rng(step).integers(0, len(stream) - LENGTH - 1, ROWS)
        return np.stack([stream[at : at + LENGTH + 1] for at in start])

    loss = partial(_loss, declaration)
    params = fit(params, encoders, loss, batch_of, seconds, steps, 2e-3, 1.0, directory.with_suffix(".training.npz"))
    _write(directory, config, tokenizer, {**params, **encoders}, parsed)


def _loss(declaration: Any, params: dict, encoders: dict, ids: jax.Array) -> Loss:
    thinker: Thinker = bind(declaration, {**params, **encoders})
    logits = jax.nn.log_softmax(thinker(ids[:, :-1]))
    nll = -jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)
    right = jnp.argmax(logits, axis=-1) == ids[:, 1:]
    return Loss(jnp.sum(nll), jnp.float32(nll.size), {"accuracy": jnp.sum(right, dtype=jnp.float32)})


def _tokenizer(pairs: list[tuple[str, str]]) -> Any:
    # The role names come often enough to end as one token each.
    texts = [*(f"{question}\n{answer}" for question, answer in pairs), *["system", "user", "assistant"] * 2000]
    return train_tokenizer(texts, VOCABULARY - len(SPECIAL_TOKENS), SPECIAL_TOKENS)


def _config(tokenizer: Any) -> dict:
    config = config_dict("thinking", tokenizer)
    thinker = config["thinker_config"]
    thinker["text_config"] |= TEXT
    for encoder in ("vision_config", "audio_config"):
        name = {"vision_config": "out_hidden_size", "audio_config": "output_dim"}[encoder]
        thinker[encoder][name] = TEXT["hidden_size"]
    config["dtype"] = thinker["dtype"] = "float32"
    return config


def _stream(tokenizer: Any, pairs: list[tuple[str, str]]) -> np.ndarray:
    """All conversations one after the other, as the chat template writes them."""
    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    texts = tokenizer.encode_batch([turns.format(*pair) for pair in pairs])
    return np.concatenate([np.asarray(one.ids, np.int32) for one in texts])


def _write(directory: Path, config: dict, tokenizer: Any, params: dict, parsed: OmniConfig) -> None:
    from safetensors.numpy import save_file

    part = directory.with_suffix(".partial")
    part.mkdir(parents=True, exist_ok=True)
    arrays = {f"thinker/{path}": np.asarray(x, np.float32) for path, x in flatten(params).items()}
    tensors = {
        name: leaf.take(arrays[leaf.path][index], place)
        for leaf in table(parsed)
        for index in leaf.indices()
        for name, place in leaf.placements(index)
    }
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(part, tokenizer)
    files = {"config": config, "preprocessor_config": preprocessor_dict(config), "generation_config": GENERATION_CONFIG}
    for name, value in files.items():
        (part / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    part.rename(directory)
