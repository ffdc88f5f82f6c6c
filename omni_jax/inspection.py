"""`omni-jax inspect`: what a checkpoint holds and what memory it needs, from its headers alone."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from omni_jax.inputs.values import whole
from omni_jax.loading import default_dtype
from omni_jax.sharding import check_mesh, mesh_name
from omni_jax.weights.adapters import open_adapter
from omni_jax.weights.budget import cache_bytes
from omni_jax.weights.mesh_text import own_or_shared, parse_parts
from omni_jax.weights.model import open_model
from omni_jax.weights.parts import PARTS, declared_arrays
from omni_jax.weights.placement import AUTO, Placement, resolve_placement
from omni_jax.weights.stored import StoredModel


@dataclass(frozen=True)
class Inspect:
    """Report a checkpoint's contents and memory needs, from its headers alone."""

    model: Path
    """Converted checkpoint, Hugging Face directory, snapshot folder of the hub's cache, model id, or nano."""
    adapter: Path | None = None
    """Also report what a LoRA adapter for this model adapts."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type to load the weights in; by default as loading on this machine would."""
    quantize: Literal["int8"] | None = None
    """Count the routed experts in eight bits."""
    context: int = 4096
    """Tokens per conversation."""
    batch: int = 1
    """Conversations at once."""
    mesh: str | None = None
    """Report what each device of such a mesh would hold; only auto needs the devices to be here."""
    json: bool = False
    """Machine-readable output."""


def inspect(command: Inspect) -> None:
    """Print what the checkpoint holds."""
    for name, value in (("--context", command.context), ("--batch", command.batch)):
        whole(name, value, "give at least 1")
    model = open_model(command.model, quantize=command.quantize)
    report = {"checkpoint": str(command.model), "kind": model.kind, **summarise(model, command)}
    if command.adapter is not None:
        report["adapter"] = _adapted(model, command.adapter)
    if command.mesh is not None:
        report |= _on_devices(model, command.mesh, command)
    print(json.dumps(report) if command.json else _table(report))


def summarise(model: StoredModel, command: Inspect) -> dict[str, Any]:
    """Parameters and bytes of each part, and the bytes of weights and cache that a run needs.

    The cache is the Thinker's, in the widest type of the weights.
    """
    text, talker = model.config.thinker.text, model.config.talker
    loaded, stored = _loaded_dtype(model, command), " and ".join(sorted({*model.types.values()}))
    described = model.parts(loaded)
    parts = {
        part.name: {
            "arrays": len(part.itemsizes),
            "parameters": sum(prod(shape) for shape, _ in declared_arrays(part.declaration).values()),
            "bytes": part.weight_bytes({}),
        }
        for part in described
    }
    speaks, widest = set(PARTS) <= parts.keys(), max(described[0].itemsizes.values())
    cache = cache_bytes(text, widest, {}, command.batch, command.context)
    return {
        "stored_dtype": stored,
        "dtype": loaded or stored,
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "layers": text.num_layers,
        "experts": text.num_experts,
        "experts_per_token": text.experts_per_token,
        "max_context": text.max_position_embeddings,
        "speech": speaks,
        "speakers": [name for name, _ in talker.speakers] if talker and speaks else [],
        "cache_bytes_per_token": 2 * text.num_layers * text.num_kv_heads * text.head_dim * widest,
        "cache_bytes": cache,
        "thinker_bytes": parts["thinker"]["bytes"] + cache if "thinker" in parts else None,
    }


def _loaded_dtype(model: StoredModel, command: Inspect) -> str | None:
    """The type in which the weights would be held; None for as they are stored."""
    return command.dtype or default_dtype(model.types.values())


def _on_devices(model: StoredModel, mesh: str, command: Inspect) -> dict[str, Any]:
    """What each device of a mesh would hold: bytes of weights by part, and of the Thinker's cache."""
    parts, held, cache = model.parts(_loaded_dtype(model, command)), {}, 0
    chosen = resolve_placement(AUTO, parts) if mesh == AUTO else Placement({})
    wanted = {name: dict(on.shape) for name, on in chosen.meshes.items()} or parse_parts(mesh, model.declarations)
    for part in parts:
        sizes = own_or_shared(part.name, wanted)
        check_mesh({part.name: part.declared}, sizes)
        held[part.name] = {"mesh": mesh_name(sizes), "bytes": part.weight_bytes(sizes)}
        if part.name == "thinker":
            cache = part.cache_bytes(sizes, command.batch, command.context)
    return {"mesh": mesh, "mesh_reason": chosen.reason, "device_bytes": held, "device_cache_bytes": cache}


def _adapted(model: StoredModel, where: Path) -> dict[str, Any]:
    """What an adapter adapts: its parameters, and the matrices of each kind."""
    adapter = open_adapter(where, model.config)
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", module) for module in adapter.matrices)
    return {"directory": str(adapter.directory), "parameters": adapter.parameters, "matrices": dict(kinds)}


def _adapter_lines(report: dict[str, Any]) -> list[str]:
    """What the report says of an adapter; experts that it leaves out are easily overlooked."""
    adapter = report["adapter"]
    lines = ["", f"adapter {adapter['directory']}: {adapter['parameters']:,} parameters"]
    lines += [f"  {count:,} matrices {kind}" for kind, count in adapter["matrices"].items()]
    if report["experts"] and not any(".experts." in kind for kind in adapter["matrices"]):
        lines.append("  experts: not adapted")
    return lines


def _table(report: dict[str, Any]) -> str:
    """The report as text for people."""
    lines = [f"{report['checkpoint']}: {report['kind']} in {report['stored_dtype']}, sizes in {report['dtype']}", ""]
    lines += [f"{'part':<10}{'arrays':>8}{'parameters':>18}{'size':>12}"]
    rows = [*report["parts"].items(), ("all", {"arrays": sum(p["arrays"] for p in report["parts"].values()), **report})]
    for name, part in rows:
        lines.append(f"{name:<10}{part['arrays']:>8}{part['parameters']:>18,}{_size(part['bytes']):>12}")
    lines += [
        "",
        f"text model: {report['layers']} layers, {report['experts']} experts of which {report['experts_per_token']} "
        f"work on each token, context {report['max_context']:,}",
        f"speakers: {', '.join(report['speakers']) or 'none (text only)'}",
        f"cache: {_size(report['cache_bytes_per_token'])} per token, {_size(report['cache_bytes'])} for this context",
        f"to answer in text: {_needed(report['thinker_bytes'])}",
    ]
    if report.get("mesh_reason"):
        lines.append(f"mesh {report['mesh_reason']}")
    for name, held in report.get("device_bytes", {}).items():
        more = f", and {_size(report['device_cache_bytes'])} of cache" if name == "thinker" else ""
        lines.append(f"on each device of {held['mesh']}: {_size(held['bytes'])} of the {name}'s weights{more}")
    return "\n".join(lines + (_adapter_lines(report) if "adapter" in report else []))


def _needed(count: int | None) -> str:
    """The memory that answering in text takes, if the checkpoint has a Thinker."""
    return "no Thinker is here" if count is None else f"{_size(count)} of weights and cache, plus working memory"


def _size(count: int) -> str:
    """Bytes for people: 1,500,000 -> '1.50 MB'."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
