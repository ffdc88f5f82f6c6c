"""Where a config.json states that weights are quantised, and how it states this project's own form of it.

That form is routed experts in eight bits, as compressed-tensors' format `int-quantized`: per output channel, symmetric,
weights alone, `weight` int8 [out, in] and `weight_scale` [out, 1]. `weights/schemes.py` reads what others state.
"""

from collections.abc import Iterator
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


def statements(values: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Every quantization_config in a parsed config.json or a section of it, by its dotted name, outermost first."""
    if values.get(KEY) is not None:
        yield section + KEY, values[KEY]
    for name, inner in values.items():
        if isinstance(inner, dict) and name != KEY:
            yield from statements(inner, f"{section}{name}.")


def unstated(values: dict[str, Any]) -> dict[str, Any]:
    """A parsed config.json without any quantization_config."""
    return {name: unstated(x) if isinstance(x, dict) else x for name, x in values.items() if name != KEY}


def stating(values: dict[str, Any], quantize: str | None) -> dict[str, Any]:
    """A parsed config.json that states experts in eight bits if `quantize` is "int8", as it is if None."""
    return values if quantize is None else values | {KEY: STATED}


def check_quantize(quantize: Any) -> None:
    """InputError for a way to quantise that does not exist."""
    if quantize not in (None, "int8"):
        raise InputError(f"quantize is {quantize!r}; give 'int8', or leave it out")
