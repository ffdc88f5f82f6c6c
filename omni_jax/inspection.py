"""`omni-jax inspect`: what a checkpoint holds and what memory it needs, from its headers alone."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro

from omni_jax.config import OmniConfig
from omni_jax.inputs.values import whole
from omni_jax.loading import default_dtype, describe_part
from omni_jax.models.param import declare
from omni_jax.omni import PARTS
from omni_jax.ops.cache import capacity_for
from omni_jax.sharding import check_mesh, mesh_name
from omni_jax.weights import checkpoint
from omni_jax.weights.manifest import MANIFEST, read_manifest
from omni_jax.weights.placement import AUTO, Placement, parse_parts, resolve_placement


@dataclass(frozen=True)
class Inspect:
    """Tell what a checkpoint holds and what memory it needs, from its headers alone."""

    model: tyro.conf.Positional[Path]
    """Converted checkpoint, or a Hugging Face directory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type to load the weights in; by default as loading on this machine would."""
    context: int = 4096
    """Tokens per conversation."""
    batch: int = 1
    """Conversations at once."""
    mesh: str | None = None
    """Tell what each device of such a mesh would hold; the devices need not be here, but for auto."""
    json: bool = False
    """Machine-readable output."""


def inspect(command: Inspect) -> None:
    """Print what the checkpoint holds."""
    for name, value in (("--context", command.context), ("--batch", command.batch)):
        whole(name, value, "give at least 1")
    if os.path.lexists(command.model / MANIFEST):
        from convert.verify import rows_of

        config, manifest = checkpoint.read_config(command.model), read_manifest(command.model)
        rows_of(command.model, manifest)
        leaves = manifest.leaves
        arrays = [(path, leaf.shape, leaf.dtype) for path, leaf in leaves.items()]
        kind = "converted checkpoint"
    else:
        from omni_jax.weights.plan import plan
        from omni_jax.weights.safetensors import open_checkpoint

        made = plan(open_checkpoint(command.model))
        config = made.config
        arrays = [(leaf.path, leaf.shape, dtype.name) for leaf, dtype in made.leaves]
        kind = "Hugging Face checkpoint"
    report = {"checkpoint": str(command.model), "kind": kind, **summarise(config, arrays, command)}
    if command.mesh is not None:
        report |= _on_devices(config, {path: dtype for path, _, dtype in arrays}, command.mesh, command)
    print(json.dumps(report) if command.json else _table(report))


def summarise(config: OmniConfig, arrays: list[tuple[str, tuple[int, ...], str]], command: Inspect) -> dict[str, Any]:
    """Parameters and bytes of each part, and the bytes of weights and cache that a run needs.

    arrays: path, shape and dtype of every array. The cache is the Thinker's, in the weights' type.
    """
    loaded = command.dtype or default_dtype()
    parts: dict[str, dict[str, int]] = {}
    for path, shape, dtype in arrays:
        part = parts.setdefault(path.split("/")[0], {"arrays": 0, "parameters": 0, "bytes": 0})
        part["arrays"] += 1
        part["parameters"] += prod(shape)
        part["bytes"] += prod(shape) * jnp.dtype(loaded or dtype).itemsize
    text, speaks = config.thinker.text, set(PARTS) <= parts.keys()
    dtype = jnp.dtype(loaded or arrays[0][2])
    per_token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * dtype.itemsize
    cache = per_token * capacity_for(min(command.context, text.max_position_embeddings)) * command.batch
    return {
        "stored_dtype": arrays[0][2],
        "dtype": dtype.name,
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "layers": text.num_layers,
        "experts": text.num_experts,
        "experts_per_token": text.experts_per_token,
        "max_context": text.max_position_embeddings,
        "speech": speaks,
        "speakers": [name for name, _ in config.talker.speakers] if config.talker and speaks else [],
        "cache_bytes_per_token": per_token,
        "cache_bytes": cache,
        "thinker_bytes": parts["thinker"]["bytes"] + cache if "thinker" in parts else None,
    }


def _on_devices(config: OmniConfig, types: dict[str, str], mesh: str, command: Inspect) -> dict[str, Any]:
    """What each device of a mesh would hold: bytes of weights by part, and of the Thinker's cache."""
    present = [part for part in PARTS if any(path.startswith(f"{part}/") for path in types)]
    loaded, held, cache = command.dtype or default_dtype(), {}, 0
    parts = [
        describe_part(name, declare(PARTS[name], getattr(config, name)), config, types, loaded) for name in present
    ]
    chosen = resolve_placement(AUTO, parts) if mesh == AUTO else Placement({})
    asked = {name: on.shape for name, on in chosen.meshes.items()} or parse_parts(mesh, present)
    for part in parts:
        sizes = asked.get("") or asked.get(part.name) or asked["talker"]
        check_mesh({part.name: part.declared}, sizes)
        held[part.name] = {"mesh": mesh_name(sizes), "bytes": part.weight_bytes(sizes)}
        if part.name == "thinker":
            cache = part.cache_bytes(sizes, command.batch, command.context)
    return {"mesh": mesh, "mesh_reason": chosen.reason, "device_bytes": held, "device_cache_bytes": cache}


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
        f"work on a token, context {report['max_context']:,}",
        f"speakers: {', '.join(report['speakers']) or 'none (text only)'}",
        f"cache: {_size(report['cache_bytes_per_token'])} a token, {_size(report['cache_bytes'])} for this context",
        f"to answer in text: {_needed(report['thinker_bytes'])}",
    ]
    if report.get("mesh_reason"):
        lines.append(f"mesh {report['mesh_reason']}")
    for name, held in report.get("device_bytes", {}).items():
        more = f", and {_size(report['device_cache_bytes'])} of cache" if name == "thinker" else ""
        lines.append(f"on each device of {held['mesh']}: {_size(held['bytes'])} of the {name}'s weights{more}")
    return "\n".join(lines)


def _needed(count: int | None) -> str:
    """What answering in text takes, if the Thinker is there."""
    return "no Thinker is here" if count is None else f"{_size(count)} of weights and cache, beside working memory"


def _size(count: int) -> str:
    """Bytes for people: 1,500,000 -> '1.50 MB'."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
