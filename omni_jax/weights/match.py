"""Whether a checkpoint's tensors are those that a key map asks for; models and drafters are checked alike.

Names, shapes and dtypes suffice, so nothing is read. All that is wrong is said in one error, a few names of each kind.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from omni_jax.errors import CheckpointError
from omni_jax.weights.headers import INT8, WEIGHT_DTYPES, Tensor
from omni_jax.weights.layout import Leaf
from omni_jax.weights.safetensors import SourceCheckpoint

# How many names an error shows of each kind.
SHOWN = 10
NAMED_DTYPES = {dtype.name: dtype for dtype in WEIGHT_DTYPES.values()}


def check_tensors(
    source: SourceCheckpoint,
    rows: Sequence[Leaf],
    kept: Sequence[Leaf],
    cause_of: Callable[[str], str] = lambda name: "",
    remedy_for: Callable[[list[str]], str] = lambda missing: "",
) -> None:
    """CheckpointError unless every tensor of `source` has a place in `rows`, and all that `kept` needs is there.

    Args:
        source: the checkpoint.
        rows: the whole key map.
        kept: the rows of it that will be read.
        cause_of: why a tensor of this name may have no place, and what to do; empty where nothing is known.
        remedy_for: what to do about these missing names.
    """
    problems = _unexpected(source, rows, cause_of) + _missing(source, kept, remedy_for) + _wrong(source, kept)
    if problems:
        raise CheckpointError(f"{source.directory}: does not fit its config.json\n" + "\n".join(problems))


def with_dtypes(
    source: SourceCheckpoint, leaves: Iterable[Leaf], dtype: str | None
) -> tuple[tuple[Leaf, np.dtype], ...]:
    """Each leaf with the dtype to read it in: `dtype`, or that of its tensors; CheckpointError where these differ."""
    if dtype is not None and dtype not in NAMED_DTYPES:
        raise CheckpointError(f"dtype {dtype!r}: choose from {sorted(NAMED_DTYPES)}")
    wanted = NAMED_DTYPES[dtype] if dtype else None
    return tuple((leaf, _dtype(source, leaf) if leaf.int8 or wanted is None else wanted) for leaf in leaves)


def _names(rows: Iterable[Leaf]) -> list[str]:
    return [name for leaf in rows for index in leaf.indices() for name, _ in leaf.placements(index)]


def _unexpected(source: SourceCheckpoint, rows: Sequence[Leaf], cause_of: Callable[[str], str]) -> list[str]:
    """Tensors without a place, those of each cause by themselves."""
    causes: dict[str, list[str]] = {}
    for name in sorted(set(source.tensors) - set(_names(rows))):
        causes.setdefault(cause_of(name), []).append(name)
    what = "tensors have no place in the model"
    return [x for cause, names in causes.items() for x in _listed(what, names, f"; {cause}" if cause else "")]


def _missing(source: SourceCheckpoint, rows: Sequence[Leaf], remedy_for: Callable[[list[str]], str]) -> list[str]:
    missing = [name for name in _names(rows) if name not in source.tensors]
    return _listed("tensors are missing", missing, remedy_for(missing)) if missing else []


def _wrong(source: SourceCheckpoint, rows: Sequence[Leaf]) -> list[str]:
    """Tensors of another shape than the modules declare, or of a dtype that cannot be a weight."""
    shapes, dtypes = [], []
    for leaf in rows:
        for index in leaf.indices():
            for name, place in leaf.placements(index):
                fitting = INT8 if leaf.int8 else WEIGHT_DTYPES
                tensor = source.tensors.get(name, Tensor(place.shape, next(iter(fitting))))
                if tensor.shape != place.shape:
                    shapes.append(f"{name} {list(tensor.shape)}, expected {list(place.shape)}")
                if tensor.dtype not in fitting:
                    dtypes.append(f"{name} {tensor.dtype}")
    hint = f"; only {', '.join(WEIGHT_DTYPES)} are read: take the unquantised release"
    return _listed("tensors have another shape", shapes) + _listed("tensors have an unsupported dtype", dtypes, hint)


def _listed(what: str, items: list[str], hint: str = "") -> list[str]:
    if not items:
        return []
    shown = "".join(f"\n    {item}" for item in items[:SHOWN])
    return [f"  {len(items):,} {what}{hint}:{shown}" + ("\n    ..." if len(items) > SHOWN else "")]


def _dtype(source: SourceCheckpoint, leaf: Leaf) -> np.dtype:
    """The one dtype of all tensors in a leaf."""
    seen: dict[str, str] = {}
    for name in _names([leaf]):
        seen.setdefault(source.tensors[name].dtype, name)
    if len(seen) > 1:
        mixed = ", ".join(f"{name} is {dtype}" for dtype, name in seen.items())
        raise CheckpointError(
            f"{source.directory}: {leaf.path} would mix dtypes ({mixed}); choose one with --dtype, or dtype= in Python"
        )
    return (WEIGHT_DTYPES | INT8)[next(iter(seen))]
