"""A public quantised checkpoint as if it had been stored in float.

    source -> widened -> the same source, of which each quantised weight [out, in] reads as float under its plain name

Which weights are quantised, their shapes and schemes follow from headers and config.json (`schemes`); a weight is
unpacked and scaled when it is read, in float32, and then rounded once to the type that is asked for. So at most the
weights that are being read exist in float besides what is loaded. Scales of activations and caches are left out: what
is loaded computes in float.

Sources: as in `schemes` and `unpack`. X is a module's name, G the groups that share a scale:

    packed  X.weight_packed int32 [out, in * bits / 32], X.weight_scale [out, G], X.weight_zero_point int8 [out, G] or
            packed int32 [out * bits / 32, G], X.weight_shape [2], X.weight_g_idx [in]
    scaled  X.weight int8 or F8_E4M3 [out, in], X.weight_scale or X.weight_scale_inv: one, [out, 1], [out, G] or a scale
            for each block, X.weight_zero_point
    gptq    X.qweight int32 [in * bits / 32, out], X.scales [G, out], X.qzeros int32 [G, out * bits / 32], X.g_idx [in]
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from omni_jax.errors import CheckpointError
from omni_jax.quantization import unstated
from omni_jax.weights.headers import FLOAT8, INT8, NUMPY_DTYPES, WEIGHT_DTYPES, Tensor
from omni_jax.weights.match import NAMED_DTYPES
from omni_jax.weights.safetensors import SourceCheckpoint
from omni_jax.weights.schemes import BITS, REMEDY, Scheme, Stated, stated_schemes
from omni_jax.weights.unpack import WORD_BITS, plus_one, rescaled, unpacked

# Tensors that concern activations and caches, by the last part of their names.
UNUSED = ("input_scale", "input_zero_point", "output_scale", "activation_scale", "q_scale", "k_scale", "v_scale")
NARROW = (*INT8, *FLOAT8)
INDICES = ("I32", "I64")
Rows = tuple[int, int]


@dataclass(frozen=True)
class Held:
    """A quantised weight: its shape [out, in], the tensors that it is made of, and what reads rows of it as float32."""

    shape: tuple[int, int]
    parts: tuple[str, ...]
    read: Callable[[Rows], np.ndarray]


@dataclass(frozen=True)
class Widened(SourceCheckpoint):
    """A checkpoint whose quantised weights (`held`, by their names) read as float, computed at each read."""

    source: SourceCheckpoint
    held: dict[str, Held]

    def read(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """As `SourceCheckpoint.read`; CheckpointError for tensors whose values contradict each other."""
        if name not in self.held:
            return self.source.read(name, rows)
        held = self.held[name]
        with np.errstate(over="ignore"):  # Callers look for infinities.
            values = held.read((0, held.shape[0]) if rows is None else rows)
            return values.astype(NUMPY_DTYPES[self.tensors[name].dtype], copy=False)


def widened(source: SourceCheckpoint, dtype: str | None = None) -> SourceCheckpoint:
    """`source` with its quantised weights in float; `source` itself where its config.json states none to be widened.

    dtype: the type that will be asked for, by default that of most weights which the checkpoint holds in float.
    CheckpointError, before any weight is read, for a format that is not read and for tensors that do not fit it.
    """
    stated = stated_schemes(source.config, source.config_file)
    if stated is None:
        return source
    held = dict(_held(source, stated))
    parts = {part for one in held.values() for part in one.parts}
    tensors = {
        name: tensor
        for name, tensor in source.tensors.items()
        if name not in parts and name.rpartition(".")[2] not in UNUSED
    }
    plain = Counter(x.dtype for name, x in tensors.items() if name.endswith(".weight") and x.dtype in WEIGHT_DTYPES)
    wanted = NAMED_DTYPES.get(dtype) if dtype else None
    kind = next((name for name, known in WEIGHT_DTYPES.items() if known == wanted), None)
    kind = kind or max(plain, key=plain.__getitem__, default="F32")
    for name, one in held.items():
        tensors[name] = Tensor(one.shape, kind, source.tensors[one.parts[0]].file)
    return Widened(source.directory, unstated(source.config), source.config_file, tensors, source, held)


def _held(source: SourceCheckpoint, stated: Stated) -> Iterator[tuple[str, Held]]:
    """Every quantised weight by its name."""
    by_layout: dict[str, tuple[Scheme, ...]] = {}
    for scheme in stated.schemes:
        by_layout[scheme.layout] = (*by_layout.get(scheme.layout, ()), scheme)
    for name, tensor in source.tensors.items():
        module, _, last = name.rpartition(".")
        if last == "weight_packed" and "packed" in by_layout:
            found = _packed(source, module, by_layout["packed"])
        elif last == "weight" and tensor.dtype in NARROW and "scaled" in by_layout:
            found = _scaled(source, module, by_layout["scaled"])
        elif last == "qweight" and "gptq" in by_layout:
            found = _gptq(source, module, by_layout["gptq"], stated)
        else:
            continue
        weight = f"{module}.weight"
        if weight in source.tensors and weight not in found.parts:
            raise CheckpointError(f"{source.directory}: {weight!r} is there beside {name!r}; remove one of them")
        yield weight, found


def _packed(source: SourceCheckpoint, module: str, schemes: tuple[Scheme, ...]) -> Held:
    """A weight in compressed-tensors' format pack-quantized."""
    packed, scale, zero, order, size = (
        f"{module}.weight_{x}" for x in ("packed", "scale", "zero_point", "g_idx", "shape")
    )
    out, words = _matrix(source, packed, ("I32",))
    grid = _grid(source, scale, WEIGHT_DTYPES)
    # Where headers do not tell the width, a tensor does.
    widths = {grid[1] * scheme.columns for scheme in schemes}
    if grid[1] == 1 or len(widths) > 1:
        _vector(source, size, 2)
        widths = {int(source.read(size)[1])}
    shape = (out, widths.pop())
    scheme = next((x for x in schemes if x.words(shape[1]) == words and x.grid(shape) == grid), None)
    if scheme is None:
        raise _unfitting(source, packed, scale)
    optional = tuple(name for name in (zero, order) if name in source.tensors)
    if zero in optional:
        along = -(-out // (WORD_BITS // scheme.bits)) if source.tensors[zero].dtype == "I32" else grid[0]
        if _grid(source, zero, ("I32", "I8")) != (along, grid[1]):
            raise _unfitting(source, packed, zero)
    if order in optional:
        _vector(source, order, shape[1])
    parts = (packed, scale, *optional, *([size] if size in source.tensors else []))
    return Held(shape, parts, partial(_read_packed, source, module, scheme, shape[1]))


def _read_packed(source: SourceCheckpoint, module: str, scheme: Scheme, columns: int, rows: Rows) -> np.ndarray:
    # Numbers are stored from 0, so zero points are in the middle unless they are stored themselves.
    middle = 1 << (scheme.bits - 1)
    zeros: np.ndarray | float = middle
    numbers = unpacked(source.read(f"{module}.weight_packed", rows), scheme.bits, columns)
    scales = _of_rows(source, f"{module}.weight_scale", scheme.rows, rows)
    zero, order = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
    if zero in source.tensors and source.tensors[zero].dtype == "I32":
        each = WORD_BITS // scheme.bits
        first, last = rows[0] // each, -(-rows[1] // each)
        stored = unpacked(source.read(zero, (first, last)).T, scheme.bits, (last - first) * each)
        zeros = stored.T[rows[0] - first * each : rows[1] - first * each]
    elif zero in source.tensors:
        zeros = _of_rows(source, zero, scheme.rows, rows).astype(np.float32) + middle
    groups = _groups(source, order, columns, scales.shape[1], scheme.columns)
    return rescaled(numbers, zeros, scales, groups)


def _scaled(source: SourceCheckpoint, module: str, schemes: tuple[Scheme, ...]) -> Held:
    """A weight of eight bits each, with scales beside it."""
    weight, zero = f"{module}.weight", f"{module}.weight_zero_point"
    shape = _matrix(source, weight, NARROW)
    names = [name for name in (f"{module}.weight_scale", f"{module}.weight_scale_inv") if name in source.tensors]
    if len(names) != 1:
        problem = f"has both {' and '.join(map(repr, names))}" if names else "has no weight_scale"
        raise CheckpointError(f"{source.directory}: {weight!r} {problem}; {REMEDY}")
    grid = _grid(source, names[0], WEIGHT_DTYPES)
    narrow = source.tensors[weight].dtype
    fitting = (x for x in schemes if x.float8 == (narrow in FLOAT8) and x.grid(shape) == grid)
    scheme = next(fitting, None)
    if scheme is None:
        raise _unfitting(source, weight, names[0])
    zeros = (zero,) if zero in source.tensors else ()
    if zeros and _grid(source, zero, NARROW) != grid:
        raise _unfitting(source, weight, zero)
    return Held(shape, (weight, names[0], *zeros), partial(_read_scaled, source, weight, names[0], zeros, scheme))


def _read_scaled(
    source: SourceCheckpoint, weight: str, scale: str, zero: tuple[str, ...], scheme: Scheme, rows: Rows
) -> np.ndarray:
    numbers, scales = source.read(weight, rows), _of_rows(source, scale, scheme.rows, rows)
    if scale.endswith("_inv") and (scales > 1).any():
        # No weight of a model is as large as these would be: 448 and more.
        raise CheckpointError(f"{source.directory}: {scale!r} holds reciprocals of scales, not scales; {REMEDY}")
    zeros = _of_rows(source, zero[0], scheme.rows, rows) if zero else 0.0
    groups = _groups(source, "", numbers.shape[1], scales.shape[1], scheme.columns)
    return rescaled(numbers, zeros, scales, groups)


def _gptq(source: SourceCheckpoint, module: str, schemes: tuple[Scheme, ...], stated: Stated) -> Held:
    """A weight as GPTQ stores it, transposed; its bits follow from the sizes of its tensors."""
    weight, zero, scale, order = (f"{module}.{x}" for x in ("qweight", "qzeros", "scales", "g_idx"))
    words, out = _matrix(source, weight, ("I32",))
    (groups, channels), zeros = _matrix(source, scale, WEIGHT_DTYPES), _matrix(source, zero, ("I32",))
    bits = next((x for x in BITS if zeros == (groups, out * x / WORD_BITS)), None)
    if bits is None or channels != out:
        raise _unfitting(source, weight, zero, scale)
    columns = words * WORD_BITS // bits
    sizes = {0} if groups == 1 else {x.columns for x in schemes if x.grid((out, columns))[1] == groups}
    ordered = order in source.tensors
    if ordered or (stated.ordered and groups > 1):
        _vector(source, order, columns)
    elif len(sizes) != 1:
        raise _unfitting(source, weight, scale)
    scheme = Scheme("gptq", bits, 1, sizes.pop() if len(sizes) == 1 else 0)
    parts = (weight, zero, scale, *([order] if ordered else []))
    return Held((out, columns), parts, partial(_read_gptq, source, module, scheme, stated.shifted))


def _read_gptq(source: SourceCheckpoint, module: str, scheme: Scheme, shifted: bool, rows: Rows) -> np.ndarray:
    own, bits = slice(*rows), scheme.bits
    words = source.read(f"{module}.qweight")[:, own].T
    columns = words.shape[1] * WORD_BITS // bits
    stored = source.read(f"{module}.qzeros")
    zeros = unpacked(plus_one(stored, bits) if shifted else stored, bits, stored.shape[1] * WORD_BITS // bits)
    scales = source.read(f"{module}.scales")[:, own].T
    groups = _groups(source, f"{module}.g_idx", columns, scales.shape[1], scheme.columns)
    return rescaled(unpacked(words, bits, columns), zeros[:, own].T, scales, groups)


def _of_rows(source: SourceCheckpoint, name: str, shared: int, rows: Rows) -> np.ndarray:
    """The scales or zero points [rows, G] of some rows of a weight, [1, G] where all rows share them.

    shared: how many rows share one, 0 for all.
    """
    if not shared:
        return source.read(name).reshape(1, -1)
    first = rows[0] // shared
    held = source.read(name, (first, -(-rows[1] // shared)))
    held = held.reshape(len(held), -1)
    return held if shared == 1 else held[np.arange(*rows) // shared - first]


def _groups(source: SourceCheckpoint, order: str, columns: int, count: int, shared: int) -> np.ndarray | None:
    """The group of each column of a weight; None for equal runs of columns.

    order: the tensor that says so, where there is one. count: of the groups. shared: how many columns share a group, 0
    where only that tensor says so. CheckpointError where it does not.
    """
    if order in source.tensors:
        groups = source.read(order)
        # Groups that were never set are the usual ones.
        if (groups >= 0).any():
            if (groups < 0).any():
                raise CheckpointError(f"{source.directory}: {order!r} names no group for some columns; {REMEDY}")
            if (groups >= count).any():
                raise CheckpointError(f"{source.directory}: {order!r} names groups from {count}, which have no scales")
            return groups
    if not shared and count > 1:
        raise CheckpointError(f"{source.directory}: nothing tells which columns share the {count} groups; {REMEDY}")
    return None if count * shared == columns or count == 1 else np.arange(columns) // shared


def _matrix(source: SourceCheckpoint, name: str, dtypes: Iterable[str]) -> tuple[int, int]:
    """The shape of a tensor of two axes."""
    shape = _tensor(source, name, dtypes).shape
    if len(shape) != 2:
        raise CheckpointError(f"{source.directory}: {name!r} is {list(shape)}, expected two axes; {REMEDY}")
    return shape[0], shape[1]


def _vector(source: SourceCheckpoint, name: str, length: int) -> None:
    """Check that a tensor holds this number of indices."""
    shape = _tensor(source, name, INDICES).shape
    if shape != (length,):
        raise CheckpointError(f"{source.directory}: {name!r} is {list(shape)}, expected [{length}]; {REMEDY}")


def _grid(source: SourceCheckpoint, name: str, dtypes: Iterable[str]) -> tuple[int, ...]:
    """The shape of scales or zero points: one is [1, 1], one for each row is [rows, 1], however they are stored."""
    shape = _tensor(source, name, dtypes).shape
    return shape if len(shape) > 1 else (*shape, 1) if shape else (1, 1)


def _tensor(source: SourceCheckpoint, name: str, dtypes: Iterable[str]) -> Tensor:
    """A tensor's header; CheckpointError if it is missing or of a type that does not belong there."""
    tensor = source.tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{source.directory}: {name!r} is missing, and without it its weight cannot be read")
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{source.directory}: {name!r} is {tensor.dtype}, expected {' or '.join(dtypes)}; {REMEDY}"
        )
    return tensor


def _unfitting(source: SourceCheckpoint, *names: str) -> CheckpointError:
    """The error for tensors of a weight whose shapes no scheme of config.json explains."""
    shapes = " and ".join(f"{name!r} {source.tensors[name].dtype} {list(source.tensors[name].shape)}" for name in names)
    return CheckpointError(
        f"{source.directory}: {shapes} do not fit each other and the quantization_config of its config.json; take the "
        "config.json of these weights"
    )
