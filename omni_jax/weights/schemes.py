"""What the `quantization_config` of a public quantised checkpoint says of its weights, as far as that is read.

config.json -> `stated_schemes` -> Stated -> `widened`, which finds each weight's scheme by the shapes of its tensors

So lists of modules that stay in float (`ignore`, `modules_to_not_convert`, and those of `dynamic` and `extra_config`)
are of no use here: a weight with the tensors of a quantised one is quantised. What is not read is refused, by its field
and value.

Sources: compressed-tensors `QuantizationConfig` and `QuantizationArgs`; AutoGPTQ `BaseQuantizeConfig`; AutoRound
`save_quantized_as_autoround`; transformers `FineGrainedFP8Config`; ModelOpt's `quantization_config`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omni_jax.errors import CheckpointError
from omni_jax.quantization import statements, states_int8_experts
from omni_jax.weights.unpack import WORD_BITS

REMEDY = "take the unquantised release, or one in a format that docs/devices.md lists"
# Files beside config.json that repeat what it states.
REPEATED = ("quantize_config.json", "quantization_config.json", "hf_quant_config.json")
BITS = (4, 8)
# Numbers of bits that say that a module stays in float.
FLOAT_BITS = (16, 32)
Layout = Literal["packed", "scaled", "gptq"]
FORMATS: dict[str, Layout] = {
    "pack-quantized": "packed",
    "int-quantized": "scaled",
    "naive-quantized": "scaled",
    "float-quantized": "scaled",
}
# Whether zero points are stored less one, by the names of GPTQ's formats and of AutoRound's packings.
GPTQ_SHIFTED = {"gptq": True, "gptq_v2": False}
AUTOROUND_SHIFTED = {
    "auto_round:auto_gptq": True,
    "auto_round:gptq": True,
    "auto_round:gptqmodel": False,
    "auto_round": False,
}


@dataclass(frozen=True)
class Scheme:
    """How weights [out, in] are quantised.

    layout: of their tensors. bits: of a number. float8: whether numbers are F8_E4M3. rows, columns: how many share a
    scale, 0 for all of them.
    """

    layout: Layout
    bits: int
    rows: int
    columns: int
    float8: bool = False

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the scales of a weight of this shape."""
        return (-(-shape[0] // self.rows) if self.rows else 1, -(-shape[1] // self.columns) if self.columns else 1)

    def words(self, columns: int) -> int:
        """How many words hold this number of columns."""
        return -(-columns * self.bits // WORD_BITS)


@dataclass(frozen=True)
class Stated:
    """The schemes of a checkpoint's weights.

    shifted: whether GPTQ's zero points are stored less one. ordered: whether its columns are in groups out of order.
    """

    schemes: tuple[Scheme, ...]
    shifted: bool = False
    ordered: bool = False


def stated_schemes(config: dict[str, Any], file: Path) -> Stated | None:
    """What a parsed config.json states; None for weights in float, or as this project quantises them.

    CheckpointError names the first field that states what is not read.
    """
    found = list(statements(config))
    if not found or states_int8_experts(config):
        return None
    where, values = found[0]
    for other, repeated in found[1:]:
        if repeated != values:
            raise CheckpointError(f"{file}: {where} and {other} differ; remove the one that is wrong")
    fields = _Fields(f"{file}: {where}", values)
    method = fields.one_of("quant_method", tuple(METHODS))
    return METHODS[method](fields)


@dataclass(frozen=True)
class _Fields:
    """A part of a quantization_config, and its name in errors."""

    name: str
    values: Any

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{self.name} is {_shown(self.values)}, not an object; {REMEDY}")

    def get(self, field: str, default: Any = None) -> Any:
        """The value of a field; null counts as absent."""
        value = self.values.get(field)
        return default if value is None else value

    def one_of(self, field: str, read: tuple[Any, ...], default: Any = None) -> Any:
        """The value of a field, which must be one of those that are read."""
        value = self.get(field, default)
        # 4.0 and True are neither 4 nor 1 here.
        if not any(type(value) is type(x) and value == x for x in read):
            raise self.refusal(field, f"only {', '.join(map(str, read))} are read")
        return value

    def count(self, field: str) -> int:
        """The value of a field, which must be a whole number above 0."""
        value = self.get(field)
        if type(value) is not int or value < 1:
            raise self.refusal(field, "expected a whole number above 0")
        return value

    def group_size(self) -> int:
        """How many columns share a scale, 0 for all: its field may be absent or -1 for that."""
        value = self.get("group_size", -1)
        if type(value) is not int or (value < 1 and value != -1):
            raise self.refusal("group_size", "expected -1, or a whole number above 0")
        return max(value, 0)

    def pair(self, field: str) -> tuple[int, int]:
        """The value of a field, which must be two whole numbers above 0: rows and columns of a block."""
        value = self.get(field)
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
            raise self.refusal(field, "expected rows and columns of a block")
        return value[0], value[1]

    def none_of(self, *fields: str) -> None:
        """CheckpointError for a field that changes weights in a way that is not undone here."""
        for field in fields:
            if self.get(field):
                raise self.refusal(field, "such weights are not read")

    def under(self, field: str) -> "_Fields":
        """The object in a field."""
        return _Fields(f"{self.name}.{field}", self.values.get(field))

    def each(self, field: str) -> "Iterator[_Fields]":
        """Every entry of the object in a field; none where it is absent."""
        if self.get(field) is not None:
            inner = self.under(field)
            yield from map(inner.under, inner.values)

    def refusal(self, field: str, why: str) -> CheckpointError:
        """The error for a field's value."""
        stated = _shown(self.values[field]) if field in self.values else "missing"
        return CheckpointError(f"{self.name}.{field} is {stated}; {why}: {REMEDY}")


def _compressed_tensors(fields: _Fields) -> Stated:
    fields.none_of("transform_config")
    if fields.get("sparsity_config") is not None:
        fields.under("sparsity_config").one_of("format", ("dense",), "dense")
    groups = fields.under("config_groups")
    own = fields.get("format")
    schemes = []
    for name in groups.values:
        group = groups.under(name)
        if group.get("weights") is not None:
            where = group if group.get("format") is not None or own == "mixed-precision" else fields
            layout = FORMATS[where.one_of("format", tuple(FORMATS))]
            schemes.append(_compressed_scheme(group.under("weights"), layout))
    if not schemes:
        raise fields.refusal("config_groups", "no group has weights")
    return Stated(tuple(schemes))


def _compressed_scheme(weights: _Fields, layout: Layout) -> Scheme:
    """The scheme of the weights of a config group."""
    float8 = weights.one_of("type", ("int", "float"), "int") == "float"
    bits = weights.one_of("num_bits", BITS if layout == "packed" else (8,))
    if float8 and layout == "packed":
        raise weights.refusal("type", "only whole numbers are read in this format")
    strategies = ("tensor", "channel", "group", "block") if layout == "scaled" else ("tensor", "channel", "group")
    group = weights.get("group_size")
    inferred = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = weights.one_of("strategy", strategies, inferred)
    rows, columns = {"tensor": (0, 0), "channel": (1, 0)}.get(strategy, (1, 0))
    if strategy == "group":
        columns = weights.count("group_size")
    elif strategy == "block":
        rows, columns = weights.pair("block_structure")
    return Scheme(layout, bits, rows, columns, float8)


def _gptq(fields: _Fields) -> Stated:
    name = "format" if fields.get("checkpoint_format") is None else "checkpoint_format"
    shifted = GPTQ_SHIFTED[fields.one_of(name, tuple(GPTQ_SHIFTED), "gptq")]
    fields.one_of("pack_dtype", ("int32",), "int32")
    ordered = fields.one_of("desc_act", (False, True), False)
    return Stated(tuple(_gptq_schemes(fields, "dynamic")), shifted, ordered)


def _auto_round(fields: _Fields) -> Stated:
    shifted = AUTOROUND_SHIFTED[fields.one_of("packing_format", tuple(AUTOROUND_SHIFTED))]
    fields.none_of("rotation_config")
    return Stated(tuple(_gptq_schemes(fields, "extra_config")), shifted)


def _gptq_schemes(fields: _Fields, overrides: str) -> Iterator[Scheme]:
    """The scheme of all modules, and those of the modules that a field gives numbers of their own."""
    yield _gptq_scheme(fields, fields)
    for module in fields.each(overrides):
        stays = module.get("bits") is not None and module.one_of("bits", (*BITS, *FLOAT_BITS)) in FLOAT_BITS
        if module.values and not stays:
            yield _gptq_scheme(module, fields)


def _gptq_scheme(module: _Fields, general: _Fields) -> Scheme:
    """The scheme of a module; what it leaves unsaid is that of all modules."""
    module.one_of("data_type", ("int", "int_sym", "int_asym"), "int")
    module.one_of("act_bits", FLOAT_BITS, FLOAT_BITS[0])
    bits = (module if module.get("bits") is not None else general).one_of("bits", BITS)
    grouped = module if module.get("group_size") is not None else general
    return Scheme("gptq", bits, 1, grouped.group_size())


def _fp8(fields: _Fields) -> Stated:
    fields.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    fields.one_of("scale_fmt", ("float",), "float")
    fields.one_of("expert_dtype", ("fp8",), "fp8")
    if fields.get("weight_block_size") is None:
        return _whole_fp8()
    return Stated((Scheme("scaled", 8, *fields.pair("weight_block_size"), float8=True),))


def _modelopt(fields: _Fields) -> Stated:
    fields.one_of("quant_algo", ("FP8",))
    return _whole_fp8()


def _whole_fp8() -> Stated:
    """FP8 with a scale for each weight, or for each of its output channels."""
    return Stated(tuple(Scheme("scaled", 8, rows, 0, float8=True) for rows in (0, 1)))


METHODS = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "fp8": _fp8,
    "modelopt": _modelopt,
}


def _shown(value: Any) -> str:
    """A value, as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
