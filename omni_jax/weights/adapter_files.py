"""Trained factors in PEFT's form: a key map from the arrays of low-rank updates to the tensors of an adapter.

    factors by path, their key map -> adapter_config.json, adapter_model.safetensors

Names are those of the checkpoint on disk, experts one by one, as PEFT has them for transformers 4 and as other servers
read them; PEFT 0.21 with transformers 5 fuses them itself.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.models.param import Declaration
from omni_jax.sharding import on_host
from omni_jax.weights.adapter_config import CONFIG_FILE, AdapterConfig
from omni_jax.weights.adapters import PREFIX, WEIGHTS_FILE, A, Adapter, B
from omni_jax.weights.keymap import table
from omni_jax.weights.layout import Leaf, TensorPlace
from omni_jax.weights.parts import declared_arrays
from omni_jax.weights.publish import publish

# By the last part of a module's name on disk: where the module of its weights holds its factors.
PLACES = {
    **{f"{x}_proj": f"lora/{x}" for x in ("q", "k", "v", "o", "gate", "up", "down")},
    "gate": "router_lora",
}


def factor_rows(config: OmniConfig, part: str, declaration: Declaration) -> list[Leaf]:
    """The key map of the factors that a part is declared with: rows for A and B of each projection."""
    arrays, rows = declared_arrays(declaration, f"{part}/"), []
    for leaf in table(config):
        for source in leaf.sources:
            module = source.name.removesuffix(".weight")
            place = PLACES.get(module.rpartition(".")[2])
            path = f"{leaf.path.rpartition('/')[0]}/{place}"
            if place and f"{path}/a" in arrays:
                rank, (out, inner) = arrays[f"{path}/a"][0][len(leaf.stack)], source.shape
                for name, ending, shape in (("a", A, (rank, inner)), ("b", B, (out, rank))):
                    declared = arrays[f"{path}/{name}"]
                    rows.append(
                        Leaf(
                            f"{path}/{name}", leaf.stack, *declared, (TensorPlace(f"{PREFIX}{module}{ending}", shape),)
                        )
                    )
    return rows


def write_adapter(
    directory: Path, factors: Mapping[str, jax.Array], rows: Sequence[Leaf], config: AdapterConfig
) -> None:
    """Write an adapter into the new `directory`, float32; all processes must call this where they share the factors.

    Args:
        directory: where; it appears complete or not at all.
        factors: by path, a [*stack, r, in] and b [*stack, out, r], as their rows say.
        rows: their key map.
        config: what adapter_config.json says.

    CheckpointError for a directory that exists or cannot be written.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for leaf in rows:
        array = on_host(factors[leaf.path]).astype(np.float32)
        for index in leaf.indices():
            tensors |= {name: leaf.take(array[index], place) for name, place in leaf.placements(index)}
    with publish(directory, needed=sum(tensor.nbytes for tensor in tensors.values())) as partial:
        if jax.process_index() == 0:
            modules = {name.removeprefix(PREFIX).removesuffix(A) for name in tensors if name.endswith(A)}
            (partial / CONFIG_FILE).write_text(json.dumps(_values(config, modules), indent=2) + "\n")
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})


def read_factors(adapter: Adapter, rows: Sequence[Leaf], scale: float) -> dict[str, np.ndarray]:
    """An adapter's factors by path, float32 and shaped as their rows say, to train on; scale: what products count.

    InputError for an adapter that has other modules or ranks than the rows.
    """
    arrays = {leaf.path: np.empty(leaf.shape, np.float32) for leaf in rows}
    left = set(adapter.matrices)
    for leaf in rows:
        for index in leaf.indices():
            for name, place in leaf.placements(index):
                module = name.removeprefix(PREFIX).removesuffix(A).removesuffix(B)
                if module not in adapter.matrices:
                    raise InputError(f"{adapter.directory}: holds nothing for {module}; choose the targets that it has")
                a, b = adapter.factors(module)
                tensor = a if name.endswith(A) else b / np.float32(scale)
                if tensor.shape != place.shape:
                    raise InputError(f"{adapter.directory}: {module} has rank {len(a)}; train on with that rank")
                leaf.put(arrays[leaf.path][index], place, tensor)
                left.discard(module)
    if left:
        raise InputError(f"{adapter.directory}: also adapts {min(left)}; choose the targets that it has")
    return arrays


def _values(config: AdapterConfig, modules: set[str]) -> dict[str, Any]:
    """What adapter_config.json holds for an adapter of these modules."""
    parts = {re.split(r"\.\d+\.", module)[0].removesuffix(".layers") for module in modules}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        # Modules of other parts that have the same names.
        "exclude_modules": rf"(?!({'|'.join(map(re.escape, sorted(parts)))})\.).*|.*\.?(visual|audio_tower)\..*",
    }
