"""How a config.json states that routed experts are in eight bits: as compressed-tensors' format `int-quantized`.

Per output channel, symmetric, weights alone: `weight` int8 [out, in] and `weight_scale` [out, 1].
"""

from typing import Any

from omni_jax.errors import InputError

KEY = "quantization_config"
# The experts' linear layers by the names of their modules.
EXPERTS = r"(thinker|talker)\.model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj"
STATED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": [f"re:{EXPERTS}"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        }
    },
}


def states_int8_experts(values: dict[str, Any]) -> bool:
    """Whether a parsed config.json states just this."""
    return values.get(KEY) == STATED


def stating(values: dict[str, Any], quantize: str | None) -> dict[str, Any]:
    """A parsed config.json that states experts in eight bits if `quantize` is "int8", as it is if None."""
    return values if quantize is None else values | {KEY: STATED}


def check_quantize(quantize: Any) -> None:
    """InputError for a way to quantise that does not exist."""
    if quantize not in (None, "int8"):
        raise InputError(f"quantize is {quantize!r}; give 'int8', or leave it out")
