"""Public formats of quantised weights, packed here number by number, and quantised copies of a checkpoint.

A maker draws the numbers, zero points and scales of a weight [out, in] and gives its tensors, by the last part of their
names, and the weight that they stand for, float32.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
# The Thinker's projections and some of its experts, and its routers.
LINEAR = r"thinker\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.experts\.[0-3]\.(gate|up|down)_proj)"
ROUTER = r"thinker\.model\.layers\.\d+\.mlp\.gate"
Shape = tuple[int, int]
Made = tuple[dict[str, np.ndarray], np.ndarray]
Maker = Callable[[np.random.Generator, Shape], Made]


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers [R, C] from 0 in words int32 [R, ...], the first number in the lowest bits."""
    each = 32 // bits
    words = np.zeros((len(numbers), -(-numbers.shape[1] // each)), np.uint64)
    for column in range(numbers.shape[1]):
        words[:, column // each] |= numbers[:, column].astype(np.uint64) << np.uint64(bits * (column % each))
    return words.astype(np.uint32).view(np.int32)


def draw(rng: np.random.Generator, shape: Shape, dtype: Any = np.float32) -> np.ndarray:
    """Scales, all different."""
    return rng.uniform(0.002, 0.004, shape).astype(dtype)


def packed(bits: int, group: int | None, zero: str = "", ordered: bool = False, scale_dtype: Any = np.float32) -> Maker:
    """compressed-tensors' pack-quantized; group: None for a scale per channel; zero: "", "packed" or "plain"."""

    def make(rng: np.random.Generator, shape: Shape) -> Made:
        (out, width), G = shape, 1 if group is None else shape[1] // group
        numbers = rng.integers(0, 2**bits, shape)
        scale, zeros = draw(rng, (out, G), scale_dtype), np.full((out, G), 2 ** (bits - 1))
        owner = np.arange(width) // (group or width)
        tensors = {"weight_packed": pack(numbers, bits), "weight_scale": scale}
        tensors["weight_shape"] = np.array(shape)
        if zero:
            zeros = rng.integers(0, 2**bits, (out, G))
            plain = (zeros - 2 ** (bits - 1)).astype(np.int8)
            tensors["weight_zero_point"] = pack(zeros.T, bits).T.copy() if zero == "packed" else plain
        if ordered:
            owner = rng.permutation(owner)
            tensors["weight_g_idx"] = owner.astype(np.int32)
        return tensors, (numbers - zeros[:, owner]).astype(np.float32) * scale[:, owner].astype(np.float32)

    return make


def int8(asymmetric: bool = False) -> Maker:
    """compressed-tensors' int-quantized and naive-quantized, per channel."""

    def make(rng: np.random.Generator, shape: Shape) -> Made:
        numbers, scale = rng.integers(-128, 128, shape), draw(rng, (shape[0], 1))
        zeros = rng.integers(-128, 128, (shape[0], 1)) if asymmetric else np.zeros((shape[0], 1), int)
        tensors = {"weight": numbers.astype(np.int8), "weight_scale": scale}
        if asymmetric:
            tensors["weight_zero_point"] = zeros.astype(np.int8)
        return tensors, (numbers - zeros).astype(np.float32) * scale

    return make


def float8(strategy: str, scale: str = "weight_scale", scale_dtype: Any = np.float32) -> Maker:
    """FP8 with a scale for the whole "tensor", also as a "scalar" without axes, each "channel" or "block" of 128."""

    def make(rng: np.random.Generator, shape: Shape) -> Made:
        numbers = rng.standard_normal(shape).astype(FLOAT8)
        block = {"channel": (1, shape[1]), "block": (128, 128)}.get(strategy, shape)
        scales = draw(rng, (-(-shape[0] // block[0]), -(-shape[1] // block[1])), scale_dtype)
        rows, columns = (np.arange(n) // b for n, b in zip(shape, block, strict=True))
        wide = numbers.astype(np.float32) * scales.astype(np.float32)[rows][:, columns]
        stored = scales.reshape({"tensor": (1,), "scalar": ()}.get(strategy, scales.shape))
        return {"weight": numbers, scale: stored, "input_scale": np.ones(1, np.float32)}, wide

    return make


def gptq(bits: int, group: int, shifted: bool, order: str = "usual", scale_dtype: Any = np.float32) -> Maker:
    """GPTQ; order: "usual", "permuted", or "" for none; shifted: zero points as the first version stores them."""

    def make(rng: np.random.Generator, shape: Shape) -> Made:
        (out, width), G = shape, -(-shape[1] // group)
        numbers, zeros = rng.integers(0, 2**bits, shape), rng.integers(0, 2**bits, (out, G))
        scale = draw(rng, (out, G), scale_dtype)
        words = pack(zeros.T, bits)
        if shifted:  # A word less one in each number, as one number, which a zero makes borrow.
            ones = sum(1 << shift for shift in range(0, 32, bits))
            words = ((words.astype(np.int64) - ones) % 2**32).astype(np.uint32).view(np.int32)
        owner = np.arange(width) // group
        owner = rng.permutation(owner) if order == "permuted" else owner
        tensors = {"qweight": pack(numbers, bits).T.copy(), "qzeros": words, "scales": scale.T.copy()}
        if order:
            tensors["g_idx"] = owner.astype(np.int32)
        return tensors, (numbers - zeros[:, owner]).astype(np.float32) * scale[:, owner].astype(np.float32)

    return make


def compressed(form: str, *weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """compressed-tensors' quantization_config, with a group for each of these descriptions of weights."""
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": x} for i, x in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups} | more


def write(
    source: Path, directory: Path, config: dict[str, Any] | None, makers: dict[str, Maker], *section: str
) -> tuple[Path, Path]:
    """Two copies of a checkpoint, of a file each: quantised, and with the weights in float that this stands for.

    config: the quantization_config, in a section of config.json. makers: by patterns of modules' names.
    """
    rng = np.random.default_rng(0)
    quantised: dict[str, np.ndarray] = {}
    plain = {name: x for file in source.glob("*.safetensors") for name, x in load_file(file).items()}
    for name in sorted(plain):
        module = name.removesuffix(".weight")
        maker = next((maker for pattern, maker in makers.items() if re.fullmatch(pattern, module)), None)
        if maker is None:
            quantised[name] = plain[name]
        else:
            tensors, plain[name] = maker(rng, plain[name].shape)
            quantised |= {f"{module}.{last}": x for last, x in tensors.items()}
    for kind, tensors in (("quantised", quantised), ("plain", plain)):
        shutil.copytree(source, directory / kind, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        save_file(tensors, directory / kind / "model.safetensors")
    file = directory / "quantised" / "config.json"
    values = json.loads(file.read_text())
    inner = values
    for key in section:
        inner = inner[key]
    inner |= {} if config is None else {"quantization_config": config}
    file.write_text(json.dumps(values))
    return directory / "quantised", directory / "plain"
