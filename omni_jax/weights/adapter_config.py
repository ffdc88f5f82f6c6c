"""The adapter_config.json of a LoRA adapter in PEFT's form: ranks and scales, and options that are refused.

Source: PEFT 0.21, `LoraConfig` and `get_pattern_key`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_jax.errors import ConfigError
from omni_jax.files import read_object

CONFIG_FILE = "adapter_config.json"
REMEDY = "name the directory that PEFT or this project saved an adapter in"
# Options that make an adapter more than two factors for each matrix, and what they stand for.
REFUSED = {
    "use_dora": "DoRA's magnitudes",
    "use_qalora": "QA-LoRA's pooled inputs",
    "use_bdlora": "block-diagonal factors",
    "lora_bias": "biases of its factors",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "embeddings of tokens",
    "layer_replication": "layers that are used several times",
    "alora_invocation_tokens": "factors that act from a token on",
    "fan_in_fan_out": "transposed weights",
    "arrow_config": "several adapters with a router",
    "kasa_config": "KaSA's singular values",
    "velora_config": "VeLoRA's projections",
    "monteclora_config": "MonteCLoRA's samples",
}
# Beginnings that leave the weights as they are; others change them, so that the factors do not fit the model's own.
BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterConfig:
    """rank and alpha, and those of modules whose names match a pattern; rslora: the scale is alpha / sqrt(rank).

    base: what the adapter was trained on, as its file says.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base: str = ""

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors, by the name that it had where the adapter was made."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's factors counts."""
        return scale_of(_matching(self.alpha_pattern, module, self.alpha), self.rank_of(module), self.rslora)


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What the product of factors of this rank counts."""
    return alpha / (rank**0.5 if rslora else rank)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """The configuration of an adapter's directory; ConfigError for what is no LoRA or has options that are refused."""
    path = directory / CONFIG_FILE
    values = read_object(path, error=ConfigError, remedy=REMEDY)
    if values.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {str(values.get('peft_type'))[:40]!r}; only LORA adapters are read")
    for option, what in REFUSED.items():
        if values.get(option):
            raise ConfigError(
                f"{path}: {option}: {what} cannot be read; merge the adapter with PEFT and load the model"
            )
    if values.get("bias", "none") != "none":
        raise ConfigError(f"{path}: the adapter also changes biases; merge it with PEFT and load the model")
    if (begun := values.get("init_lora_weights")) not in BEGINNINGS:
        raise ConfigError(
            f"{path}: init_lora_weights {str(begun)[:40]!r} changed the weights that the factors belong to; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT and load the model"
        )
    return AdapterConfig(
        _number(values, "r", path, int),
        _number(values, "lora_alpha", path, float),
        values.get("use_rslora") is True,
        _patterns(values, "rank_pattern", path, int),
        _patterns(values, "alpha_pattern", path, float),
        str(values.get("base_model_name_or_path") or ""),
    )


def _number(values: Mapping[str, Any], name: str, path: Path, kind: Any) -> Any:
    """A positive number of the file; ConfigError for anything else."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9 or kind(value) != value:
        raise ConfigError(f"{path}: {name} is {str(value)[:40]!r}, not a number above 0; {REMEDY}")
    return kind(value)


def _patterns(values: Mapping[str, Any], name: str, path: Path, kind: Any) -> dict[str, Any]:
    patterns = values.get(name) or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{path}: {name} is no object of patterns and numbers; {REMEDY}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{path}: {name} holds {pattern[:80]!r}, which is no pattern ({error})") from None
    return {pattern: _number(patterns, pattern, path, kind) for pattern in patterns}


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name, or the end of it after a point."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)
