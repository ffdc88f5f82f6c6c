"""omni-nano before it is trained: a Hugging Face directory with random weights at the scale that training begins with.

Matrices begin with fan-in scaling; norms are one, biases zero, embeddings small, and the output heads of the Thinker
and the Talker small, so that the first loss is that of a uniform guess. What the Talker reads of a frame is a sum of
sixteen codes and a token of text: fifteen of the codes begin at zero, and the text is large, else they hide it and the
Talker does not learn which word comes next.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from omni_jax.train.batch import MediaRows
from scripts.nano.config import PIXELS, nano_config, nano_tokenizer
from scripts.nano.whiten import whitened
from scripts.small.checkpoint import GENERATION_CONFIG, preprocessor_dict
from scripts.small.tensors import tensor_shapes
from scripts.small.tokenizer import write_tokenizer

# The first pattern that a name holds: (pattern, mean, standard deviation, whether that is divided by the square root of
# the inputs).
SCALES: tuple[tuple[str, float, float, bool], ...] = (
    (r"(norm|norm1|norm2|layernorm|layer_norm|ln_q|ln_post)\.weight$", 1.0, 0.0, False),
    (r"layer_scale\.scale$|\.gamma$", 0.3, 0.0, False),
    (r"\.(alpha|beta)$|bias$", 0.0, 0.0, False),
    (r"code_embedding\.weight$|pos_embed\.weight$", 0.0, 0.3, False),
    (r"code_predictor\.model\.codec_embedding\.\d+\.weight$", 0.0, 0.0, False),
    (r"text_projection\.linear_fc2\.weight$", 0.0, 2.4, True),
    (r"(embed_tokens|codec_embedding)\.weight$", 0.0, 0.1, False),
    (r"(lm_head|codec_head)(\.\d+)?\.weight$|mlp\.gate\.weight$", 0.0, 0.3, True),
    (r"weight$", 0.0, 0.8, True),
)
FILE = "model.safetensors"
# Drawn, and not changed by whitening: it tells the seed.
EMBEDDINGS = "thinker.model.embed_tokens.weight"


def write_beginning(directory: Path, texts: list[str], seed: int) -> Path:
    """Write the untrained model, whose tokens are learned from `texts`, unless it is there: its directory.

    InputError if another one is there.
    """
    if (directory / FILE).exists():
        check_beginning(directory, texts, seed)
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = nano_tokenizer(texts)
    config = nano_config(tokenizer)
    write_tokenizer(directory, tokenizer)
    for name, value in configs_of(config).items():
        write_whole(directory / name, json.dumps(value, indent=2) + "\n")
    write_tensors(directory, {name: drawn(name, shape, seed) for name, shape in tensor_shapes(config).items()})
    return directory


def check_beginning(directory: Path, texts: list[str], seed: int) -> None:
    """InputError, which says what differs, if the untrained model of a directory is not what would be written now."""
    from safetensors import safe_open

    tokenizer = nano_tokenizer(texts)
    config = nano_config(tokenizer)
    wanted = configs_of(config) | {"tokenizer.json": json.loads(tokenizer.to_str())}
    differ = [name for name, value in wanted.items() if json.loads((directory / name).read_text()) != value]
    with safe_open(directory / FILE, "np") as held:
        expected = drawn(EMBEDDINGS, tensor_shapes(config)[EMBEDDINGS], seed)
        if not differ and not np.array_equal(held.get_tensor(EMBEDDINGS), expected):
            differ = ["seed"]
    if differ:
        what = f"{directory} began with another {' and '.join(differ)}"
        raise InputError(f"{what}; go back to that, or delete drawn, begin and words beside it to train anew")


def write_whitened(directory: Path, drawn: Path, media: Sequence[MediaRows], seed: int) -> Path:
    """Write the model of `drawn` with first layers that suit `media`: its directory."""
    from safetensors.numpy import load_file

    directory.mkdir(parents=True, exist_ok=True)
    for file in drawn.iterdir():
        if file.name != FILE:
            write_whole(directory / file.name, file.read_bytes())
    write_tensors(directory, whitened(load_file(drawn / FILE), media, seed))
    return directory


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the file of weights [...] by their names; it comes last."""
    from safetensors.numpy import save

    write_whole(directory / FILE, save(dict(tensors), metadata={"format": "pt"}))


def configs_of(config: dict[str, Any]) -> dict[str, dict]:
    """The JSON files of the directory."""
    thinker = {**config["thinker_config"], "dtype": "float32"}
    config = {**config, "dtype": "float32", "thinker_config": thinker}
    preprocessor = preprocessor_dict(config) | PIXELS
    return {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "generation_config.json": GENERATION_CONFIG,
    }


def drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The values of one tensor, float32 of `shape` [...]."""
    mean, scale, shared = next((m, s, f) for pattern, m, s, f in SCALES if re.search(pattern, name))
    if shared:
        scale /= np.sqrt(np.prod(shape[1:]))
    draw = np.random.default_rng([seed, crc32(name.encode())])
    return (mean + scale * draw.standard_normal(shape)).astype(np.float32)
