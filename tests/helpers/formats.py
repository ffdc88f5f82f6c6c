"""Configurations of public quantised checkpoints, each with how its tensors are made."""

from typing import Any

from tests.helpers.quantised import LINEAR, ROUTER, Maker, compressed, float8, gptq, int8, packed

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "actorder": None}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int", "sym": True}
AUTO = AUTO | {"packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "thinker.model.layers"}
BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
LISTED = ["thinker.lm_head", "re:.*visual.*", "re:^talker\\..*"]
EXPERTS, ATTENTION = r"thinker\..*\.experts\.[0-3]\.\w+", r"thinker\.model\.layers\.\d+\.self_attn\.[qkvo]_proj"
MIXED = {
    "group_0": {"targets": ["re:.*experts.*"], "weights": INT4, "format": "pack-quantized"},
    "group_1": {"targets": ["re:.*self_attn.*"], "weights": INT8, "format": "int-quantized"},
    "group_2": {"targets": ["re:.*gate$"], "weights": INT4 | {"group_size": 64}, "format": "pack-quantized"},
}

FORMATS: dict[str, tuple[dict[str, Any], dict[str, Maker]]] = {
    "packed 4, router too": (
        compressed("pack-quantized", INT4, ignore=LISTED),
        {LINEAR: packed(4, 32), ROUTER: packed(4, 32)},
    ),
    "packed 4, zero points packed": (
        compressed("pack-quantized", INT4 | {"symmetric": False}, ignore=["re:.*mlp\\.gate$"]),
        {LINEAR: packed(4, 32, "packed")},
    ),
    "packed 8, zero points plain": (
        compressed("pack-quantized", INT4 | {"num_bits": 8, "symmetric": False}),
        {LINEAR: packed(8, 32, "plain")},
    ),
    "packed 8, zero points packed": (
        compressed("pack-quantized", INT8 | {"symmetric": False}),
        {LINEAR: packed(8, None, "packed")},
    ),
    "packed 4 per channel": (
        compressed("pack-quantized", INT8 | {"num_bits": 4}),
        {LINEAR: packed(4, None), r"thinker\.lm_head": packed(4, None)},
    ),
    "packed 4, columns ordered": (
        compressed("pack-quantized", INT4 | {"actorder": "group", "symmetric": False}),
        {LINEAR: packed(4, 32, "packed", ordered=True)},
    ),
    "packed 4 and 8": (
        {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": MIXED},
        {EXPERTS: packed(4, 32), ATTENTION: int8(), ROUTER: packed(4, 64)},
    ),
    "int-quantized": (compressed("int-quantized", INT8, quantization_status="frozen"), {LINEAR: int8()}),
    "naive-quantized": (
        compressed("naive-quantized", INT8 | {"symmetric": False}),
        {LINEAR: int8(True), ROUTER: int8(True)},
    ),
    "float-quantized per tensor": (
        compressed("float-quantized", FP8 | {"strategy": "tensor"}),
        {LINEAR: float8("tensor")},
    ),
    "float-quantized per channel": (
        compressed("float-quantized", FP8 | {"strategy": "channel"}, kv_cache_scheme=None),
        {LINEAR: float8("channel")},
    ),
    "float-quantized in blocks": (
        compressed("float-quantized", FP8 | {"strategy": "block", "block_structure": [128, 128]}),
        {LINEAR: float8("block")},
    ),
    "gptq 4": (GPTQ, {LINEAR: gptq(4, 32, True)}),
    "gptq 4, the older form": (GPTQ | {"checkpoint_format": "gptq"}, {LINEAR: gptq(4, 32, True, "")}),
    "gptq 8, one group": (GPTQ | {"bits": 8, "group_size": -1}, {LINEAR: gptq(8, 10**6, True, "")}),
    "gptq 8, version 2": (GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, {LINEAR: gptq(8, 32, False)}),
    "gptq 4, columns ordered": (GPTQ | {"desc_act": True}, {LINEAR: gptq(4, 32, True, "permuted")}),
    "gptq 4, some 8": (
        GPTQ | {"dynamic": {"+:.*experts.*": {"bits": 8, "group_size": 16}, "-:.*gate$": {}}},
        {EXPERTS: gptq(8, 16, True, ""), ATTENTION: gptq(4, 32, True, "")},
    ),
    "gptq 4, a last group that is short": (GPTQ | {"group_size": 96}, {LINEAR: gptq(4, 96, True, "")}),
    "auto-round": (AUTO, {LINEAR: gptq(4, 32, True, "")}),
    "auto-round, not shifted": (
        AUTO | {"packing_format": "auto_round:gptqmodel", "extra_config": {"thinker.lm_head": {"bits": 16}}},
        {LINEAR: gptq(4, 32, False)},
    ),
    "fp8 in blocks": (
        BLOCK | {"modules_to_not_convert": ["thinker.lm_head", "mlp.gate"]},
        {LINEAR: float8("block", "weight_scale_inv")},
    ),
    "fp8 per tensor": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        {LINEAR: float8("scalar")},
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, {LINEAR: float8("scalar")}),
}  # fmt: skip
