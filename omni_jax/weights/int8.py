"""A checkpoint as if its routed experts had been stored in eight bits.

    source -> quantised -> the same source, of which each expert's weight [out, in] reads as int8 [out, in], and
    beside it `weight_scale` [out, 1]: per output channel, symmetric

Names, shapes and config.json are those of such a checkpoint (`quantization`), so key maps, conversion and the way back
treat these tensors like all others. Everything else keeps its type: experts are nine of ten weights of the public
model, and routers, attention and the code predictor lose the most by fewer bits.
"""

import re
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

from omni_jax.errors import CheckpointError
from omni_jax.quantization import EXPERTS, KEY, check_quantize, stating
from omni_jax.weights.headers import NUMPY_DTYPES, Tensor
from omni_jax.weights.safetensors import SourceCheckpoint

WEIGHT, SCALE = ".weight", ".weight_scale"
EXPERT = re.compile(rf"{EXPERTS}\.weight")
# The largest whole number of a weight.
MOST = 127
Rows = tuple[int, int]


@dataclass(frozen=True)
class Int8Experts(SourceCheckpoint):
    """A checkpoint whose experts read as int8 with scales, computed from the tensors of `source`, each read once.

    kept: the scales of weights whose numbers were read, by the weights' names, with their rows. They are asked for
    soon after, and kept no longer: at most those of one array of the model, a thousandth of it, are here.
    """

    source: SourceCheckpoint
    kept: dict[str, tuple[Rows, np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

    def read(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """As `SourceCheckpoint.read`; CheckpointError for an expert with NaN or infinite values."""
        own = name.removesuffix(SCALE) + WEIGHT if name.endswith(SCALE) else name
        if not EXPERT.fullmatch(own):
            return self.source.read(name, rows)
        start, stop = rows or (0, self.tensors[own].shape[0])
        if name != own:
            (first, last), scale = self.kept.pop(own, ((0, 0), np.empty(0)))
            held = first <= start and stop <= last
            return scale[start - first : stop - first] if held else self._rounded(own, (start, stop))[1]
        values, scale = self._rounded(own, (start, stop))
        self.kept[own] = (start, stop), scale
        return values

    def _rounded(self, name: str, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Rows of an expert's weight as int8, and their scales."""
        weight = self.source.read(name, rows).astype(np.float32)
        values, scale = rounded(weight, NUMPY_DTYPES[self.tensors[_scale(name)].dtype])
        if not np.isfinite(scale.astype(np.float32)).all():
            raise CheckpointError(f"{self.directory}: {name!r} holds NaN or infinite values, which eight bits cannot")
        return values, scale


def quantised(source: SourceCheckpoint, quantize: str | None) -> SourceCheckpoint:
    """`source` with its routed experts in eight bits if `quantize` is "int8", as it is if None.

    InputError for another way, CheckpointError for a source that is quantised already.
    """
    check_quantize(quantize)
    if quantize is None:
        return source
    if source.config.get(KEY) is not None:
        raise CheckpointError(f"{source.directory}: is quantised already; leave quantize out")
    tensors = dict(source.tensors)
    for name, tensor in source.tensors.items():
        if EXPERT.fullmatch(name) and len(tensor.shape) == 2:
            tensors[name] = replace(tensor, dtype="I8")
            # The exponents of float16 do not reach down to all scales.
            held = "F32" if tensor.dtype == "F16" else tensor.dtype
            tensors[_scale(name)] = Tensor((tensor.shape[0], 1), held, tensor.file)
    return Int8Experts(source.directory, stating(source.config, quantize), source.config_file, tensors, source)


def rounded(weight: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """A weight float32 [out, in] as int8 [out, in], and its scales [out, 1] in `dtype`.

    A scale is rounded up before weights are divided by it, so that none of them is out of range.
    """
    exact = np.max(np.abs(weight), axis=1, keepdims=True) / MOST
    scale = exact.astype(dtype)
    if dtype == ml_dtypes.bfloat16:
        bits = scale.view(np.uint16)
        scale = (bits + (scale.astype(np.float32) < exact)).astype(np.uint16).view(dtype)
    # A channel of zeros has no scale of its own.
    scale = np.where(exact == 0, np.ones((), dtype), scale)
    with np.errstate(invalid="ignore"):
        values = np.clip(np.rint(weight / scale.astype(np.float32)), -MOST, MOST).astype(np.int8)
    return values, scale


def _scale(name: str) -> str:
    return name.removesuffix(WEIGHT) + SCALE
