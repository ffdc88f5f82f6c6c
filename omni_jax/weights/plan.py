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
from omni_jax.weights.counts import check_counts
from omni_jax.weights.keymap import table
from omni_jax.weights.layout import Leaf
from omni_jax.weights.match import check_tensors, with_dtypes
from omni_jax.weights.parts import PARTS, choose_parts, parts_of
from omni_jax.weights.safetensors import SourceCheckpoint

# A config.json that asks for this many tensors more than twice those that there are belongs to another model: it is
# refused by the numbers, before millions of names are made from it.
MOST_LISTED = 10_000

TIED = "thinker_config.tie_word_embeddings"

# Parts of names that only modified checkpoints have, and what to do about them.
ADAPTER = "adapters: merge them into the model and save it again"
QUANTISED = "take the config.json that says how (quantization_config), or the unquantised release"
WRAPPED = "these are of a wrapped model: unwrap it (`model._orig_mod`, `model.module`) and save it again"
BUFFER = "these are buffers that the model computes, not weights: leave them out when saving, as save_pretrained does"
HINTS = (
    (("lora_",), f"these are LoRA {ADAPTER}"),
    (("modules_to_save", "base_model.model."), f"these are {ADAPTER}"),
    (("qweight", "qzeros", "g_idx"), f"this checkpoint is quantised (AWQ or GPTQ): {QUANTISED}"),
    (("scale_inv",), f"this checkpoint is quantised (FP8): {QUANTISED}"),
    (
        ("absmax", "quant_map", "quant_state"),
        "this checkpoint is quantised (bitsandbytes): take the unquantised release",
    ),
    (
        ("weight_scale", "weight_packed", "weight_zero_point", "input_scale"),
        f"this checkpoint is quantised: {QUANTISED}",
    ),
    (("_orig_mod.", "_fsdp_wrapped_module.", "module.thinker.", "module.talker."), WRAPPED),
    (("inv_freq", "num_batches_tracked", "position_ids", "positional_embedding", "code_offset"), BUFFER),
    (("thinker.lm_head.",), f"config.json ties it to the embedding: correct {TIED}, or remove the tensor"),
)
# The tensors of a Thinker that was saved by itself, and what begins the names of a whole model.
ALONE, WHOLE = ("model.", "visual.", "audio_tower.", "lm_head."), ("thinker.", "talker.", "code2wav.")


@dataclass(frozen=True)
class WeightPlan:
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


def plan_weights(
    source: SourceCheckpoint, parts: tuple[str, ...] | None = None, dtype: str | None = None
) -> WeightPlan:
    """Place every tensor of `source`; keep the leaves of `parts` (default: all), in `dtype` (default: as stored)."""
    _refuse_thinker_alone(source)
    check_counts(source.config, source.tensors, len(source.tensors), source.directory)
    config = OmniConfig.from_hf(source.config, str(source.config_file))
    rows = table(config)
    _check_number(source, rows)
    chosen = choose_parts(parts, parts_of(config), source.directory)
    _refuse_memory_names(source)
    kept = [leaf for leaf in rows if leaf.path.split("/")[0] in chosen]
    check_tensors(source, rows, kept, _cause, lambda missing: _remedy(source, missing))
    leaves = with_dtypes(source, kept, dtype)
    return WeightPlan(config, leaves, sum(len(leaf.placements(index)) for leaf in kept for index in leaf.indices()))


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
    asked = sum(len(leaf.sources) * prod(leaf.shape[: len(leaf.stack)]) for leaf in rows)
    if asked > 2 * len(source.tensors) + MOST_LISTED:
        raise CheckpointError(
            f"{source.directory}: its config.json asks for {asked:,} tensors, the checkpoint has "
            f"{len(source.tensors):,}; take the config.json of these weights"
        )


def _cause(name: str) -> str:
    """Why a tensor of this name has no place, where its name says so, and what to do."""
    cause = next((what for parts, what in HINTS if any(part in name for part in parts)), "")
    if not cause and name.startswith(WHOLE[1:]):
        return "does config.json set enable_audio_output as it should?"
    return cause


def _remedy(source: SourceCheckpoint, missing: list[str]) -> str:
    """What to do about missing tensors, where it can be known."""
    held = tuple(part for part in PARTS if any(name.startswith(f"{part}.") for name in source.tensors))
    if held and all(not name.startswith(tuple(f"{part}." for part in held)) for name in missing):
        return f"; to convert what is there, ask for --parts {' '.join(held)} (parts={held} in Python)"
    if missing == ["thinker.lm_head.weight"]:
        return f"; if the embedding serves as the head too, set {TIED} in config.json"
    return ""
