"""The one way in: what a user names -> a directory -> the model that it holds, in whichever form.

where -> locate -> converted checkpoint (`checkpoint`) or Hugging Face directory (`hf`) -> StoredModel
"""

from typing import Any

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.weights import checkpoint, hf
from omni_jax.weights.locate import locate
from omni_jax.weights.manifest import is_converted
from omni_jax.weights.safetensors import read_config
from omni_jax.weights.stored import StoredModel


def open_model(
    where: Any, parts: tuple[str, ...] | None = None, dtype: str | None = None, quantize: str | None = None
) -> StoredModel:
    """The model that a path or model id names, its headers checked and none of its weights read.

    Args:
        where: a converted checkpoint, a Hugging Face directory, a snapshot of the hub's cache, or a model id.
        parts: which parts will be read, by default all that the checkpoint has.
        dtype: what they will be cast to, by default as stored.
        quantize: "int8" for routed experts in eight bits, by default as stored.

    CheckpointError, ConfigError or InputError say what is wrong and what to do.
    """
    directory = locate(where).absolute()  # The weights may be read after a change of directory.
    if not is_converted(directory):
        return hf.open_hf(directory, parts, dtype, quantize=quantize)
    model = checkpoint.open_converted(directory, parts, dtype)
    if quantize and not model.config.thinker.text.int8_experts:
        raise InputError(
            f"{directory}: is converted, and its experts are not in eight bits; convert its source again with "
            f"--quantize {quantize}"
        )
    return model


def model_config(where: Any) -> OmniConfig:
    """The configuration of the model that a path or model id names, as `open_model`, without looking at its weights."""
    directory = locate(where)
    if is_converted(directory):
        return checkpoint.read_config(directory)
    file = directory / "config.json"
    return OmniConfig.from_hf(read_config(file), str(file))
