"""Match a checkpoint's tensors with the key map before anything is read or written.

A plan exists only if every tensor of the checkpoint has one place, every array of the model is filled, and shapes and
dtypes agree; otherwise one CheckpointError lists all that is wrong. Names and shapes suffice, so the same check serves
`--dry-run` on a manifest.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from omni_jax.config import MODEL_TYPE, OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.weights.checkpoint import check_counts
from omni_jax.weights.keymap import PARTS, table
from omni_jax.weights.layout import Leaf
from omni_jax.weights.safetensors import WEIGHT_DTYPES, SourceCheckpoint, Tensor

SHOWN = 10
# Missing tensors are listed by name unless they are more than this.
MOST_LISTED = 10_000
DTYPES = {dtype.name: dtype for dtype in WEIGHT_DTYPES.values()}

# Parts of names that only modified checkpoints have, and what to do about them.
ADAPTER = "adapters: merge them into the model and save it again"
QUANTISED = "take the unquantised release"
WRAPPED = "these are of a wrapped model: unwrap it (`model._orig_mod`, `model.module`) and save it again"
BUFFER = "these are buffers that the model computes, not weights: leave them out when saving, as save_pretrained does"
HINTS = (
    (("lora_",), f"these are LoRA {ADAPTER}"),
    (("modules_to_save", "base_model.model."), f"these are {ADAPTER}"),
    (("qweight", "qzeros", "g_idx"), f"this checkpoint is quantised (AWQ or GPTQ): {QUANTISED}"),
    (("scale_inv",), f"this checkpoint is quantised (FP8): {QUANTISED}"),
    (("absmax", "quant_map", "quant_state"), f"this checkpoint is quantised (bitsandbytes): {QUANTISED}"),
    (
        ("weight_scale", "weight_packed", "weight_zero_point", "input_scale"),
        f"this checkpoint is quantised: {QUANTISED}",
    ),
    (("_orig_mod.", "_fsdp_wrapped_module.", "module.thinker.", "module.talker."), WRAPPED),
    (("inv_freq", "num_batches_tracked", "position_ids", "positional_embedding", "code_offset"), BUFFER),
    (("thinker.lm_head.",), "config.json ties it to the embedding: correct tie_word_embeddings, or remove the tensor"),
)
# The tensors of a Thinker that was saved by itself, and what begins the names of a whole model.
ALONE, WHOLE = ("model.", "visual.", "audio_tower.", "lm_head."), ("thinker.", "talker.", "code2wav.")


@dataclass(frozen=True)
class Plan:
    """What a conversion will do: the leaves of the chosen parts, each with the dtype that it will have."""

    config: OmniConfig
    leaves: tuple[tuple[Leaf, np.dtype], ...]
    tensors: int

    @property
    def parameters(self) -> int:
        """How many numbers the leaves hold."""
        return sum(prod(leaf.shape) for leaf, _ in self.leaves)

    @property
    def bytes(self) -> int:
        """Their size on disk."""
        return sum(prod(leaf.shape) * dtype.itemsize for leaf, dtype in self.leaves)

    @property
    def largest(self) -> tuple[str, int]:
        """Path and bytes of the largest leaf."""
        return max(((leaf.path, prod(leaf.shape) * dtype.itemsize) for leaf, dtype in self.leaves), key=lambda x: x[1])


def plan(source: SourceCheckpoint, parts: tuple[str, ...] | None = None, dtype: str | None = None) -> Plan:
    """Place every tensor of `source`; keep the leaves of `parts` (default: all), in `dtype` (default: the source's)."""
    _refuse_thinker_alone(source)
    check_counts(source.config, source.tensors, len(source.tensors), source.directory)
    config = OmniConfig.from_hf(source.config)
    rows = table(config)
    _check_number(source, rows)
    chosen = chosen_parts(rows, parts)
    _refuse_memory_names(source)
    kept = [leaf for leaf in rows if leaf.path.split("/")[0] in chosen]
    problems = _unexpected(source, rows) + _missing(source, kept) + _wrong(source, kept)
    if problems:
        raise CheckpointError(f"{source.directory}: does not fit its config.json\n" + "\n".join(problems))
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r}: choose from {sorted(DTYPES)}")
    leaves = tuple((leaf, DTYPES[dtype] if dtype else _dtype(source, leaf)) for leaf in kept)
    return Plan(config, leaves, sum(len(leaf.placements(index)) for leaf in kept for index in leaf.indices()))


def chosen_parts(rows: list[Leaf], parts: tuple[str, ...] | None) -> tuple[str, ...]:
    """The requested parts in their order, all that the model has by default; CheckpointError for one it lacks."""
    present = tuple(part for part in PARTS if any(leaf.path.startswith(f"{part}/") for leaf in rows))
    for part in parts or ():
        if part not in PARTS:
            raise CheckpointError(f"part {part!r} does not exist; choose from {list(PARTS)}")
        if part not in present:
            raise CheckpointError(
                f"this checkpoint has no {part}, its config.json sets enable_audio_output to "
                f"false; choose from {list(present)}"
            )
    return tuple(part for part in present if parts is None or part in parts)


def _refuse_memory_names(source: SourceCheckpoint) -> None:
    for name in source.tensors:
        if name.startswith("thinker.model.language_model.") or ".experts.gate_up_proj" in name:
            raise CheckpointError(
                f"{source.directory}: {name!r} is a name that transformers uses in memory; convert files written by "
                "save_pretrained, not a state_dict()"
            )


def _refuse_thinker_alone(source: SourceCheckpoint) -> None:
    alone = [name for name in source.tensors if name.startswith(ALONE)]
    kind = source.config.get("model_type")
    if (
        kind in (MODEL_TYPE, f"{MODEL_TYPE}_thinker")
        and alone
        and not any(name.startswith(WHOLE) for name in source.tensors)
    ):
        raise CheckpointError(
            f"{source.directory}: {alone[0]!r} and others are a Thinker by itself, without its 'thinker.'; load them "
            "into the `thinker` of the whole model in transformers, and convert what save_pretrained makes of that"
        )


def _check_number(source: SourceCheckpoint, rows: list[Leaf]) -> None:
    """Compare how many tensors config.json asks for with how many there are, before they are listed."""
    asked = sum(len(leaf.sources) * prod(len(stack.indices) for stack in leaf.stack) for leaf in rows)
    if asked > 2 * len(source.tensors) + MOST_LISTED:
        raise CheckpointError(
            f"{source.directory}: its config.json asks for {asked:,} tensors, the checkpoint has "
            f"{len(source.tensors):,}; take the config.json of these weights"
        )


def _unexpected(source: SourceCheckpoint, rows: list[Leaf]) -> list[str]:
    """Tensors without a place, those of each cause by themselves."""
    known = {name for leaf in rows for index in leaf.indices() for name, _ in leaf.placements(index)}
    causes: dict[str, list[str]] = {}
    for name in sorted(set(source.tensors) - known):
        cause = next((what for parts, what in HINTS if any(part in name for part in parts)), "")
        if not cause and name.startswith(WHOLE[1:]):
            cause = "does config.json set enable_audio_output as it should?"
        causes.setdefault(cause, []).append(name)
    what = "tensors have no place in the model"
    return [x for cause, names in causes.items() for x in _listed(what, names, f"; {cause}" if cause else "")]


def _missing(source: SourceCheckpoint, rows: list[Leaf]) -> list[str]:
    needed = [name for leaf in rows for index in leaf.indices() for name, _ in leaf.placements(index)]
    missing = [name for name in needed if name not in source.tensors]
    held = tuple(part for part in PARTS if any(name.startswith(f"{part}.") for name in source.tensors))
    hint = ""
    if held and all(not name.startswith(tuple(f"{part}." for part in held)) for name in missing):
        hint = f"; to convert what is there, ask for --parts {' '.join(held)} (parts={held} in Python)"
    elif missing == ["thinker.lm_head.weight"]:
        hint = "; if the embedding serves as the head too, set tie_word_embeddings in config.json"
    return _listed("tensors are missing", missing, hint)


def _wrong(source: SourceCheckpoint, rows: list[Leaf]) -> list[str]:
    """Tensors of another shape than the config says, or of a dtype that cannot be a weight."""
    shapes, dtypes = [], []
    for leaf in rows:
        for index in leaf.indices():
            for name, place in leaf.placements(index):
                tensor = source.tensors.get(name, Tensor(place.shape, "F32"))
                if tensor.shape != place.shape:
                    shapes.append(f"{name} {list(tensor.shape)}, expected {list(place.shape)}")
                if tensor.dtype not in WEIGHT_DTYPES:
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
    for index in leaf.indices():
        for name, _ in leaf.placements(index):
            seen.setdefault(source.tensors[name].dtype, name)
    if len(seen) > 1:
        mixed = ", ".join(f"{name} is {dtype}" for dtype, name in seen.items())
        raise CheckpointError(f"{source.directory}: {leaf.path} would mix dtypes ({mixed}); choose one with --dtype")
    return WEIGHT_DTYPES[next(iter(seen))]
