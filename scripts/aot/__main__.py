"""Compile the model's programs for one H200 on a machine that has no GPU, and report what the compiler made of them.

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm
    pip install tokamax                                # or leave it out: then experts run as tiles, as they would there
    python -m scripts.aot --json report.json
    python -m scripts.aot --only speech         # Talker and Code2Wav alone
    python -m scripts.aot --mesh expert=4       # for four of them: sizes of one, and what travels between them

`aot_programs.py` lists the programs. Per program: compile seconds, gigabytes of arguments and temporaries, the largest
array that a launch writes anew, kernels in the program, launches (those in loops of known length counted every time; a
chunk of decode counts one step, one of speech one frame), and how many kernels do nothing but copy as many bytes as a
weight (a layer's, of stacked ones), a layer's cache or a whole cache holds. Of a branch, the longer arm counts, so
launches of tiles are an upper bound. For several devices: what one device sends, had every collective a ring of the
devices that take part in it, by token that these devices make together.

Nothing is timed. The compiler neither autotunes without a device nor can it use cuDNN, so kernels that depend on
either differ on the machine itself.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from omni_jax.ops import moe
from omni_jax.ops.cache import capacity_for
from omni_jax.sharding import mesh_name, split_over
from omni_jax.weights.budget import describe_part
from omni_jax.weights.mesh_text import parse_mesh
from scripts.aot.hlo import Module
from scripts.aot.programs import Program, Target, h200, mesh_programs, programs

WHEELS = {
    "jax_cuda13_plugin": "jax-cuda13-plugin",
    "jax_plugins.xla_cuda13": "jax-cuda13-pjrt",
    "nvidia.cu13": "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm",
}
# What an H200 holds, and the lengths of conversations, prompt and reply, for which room is planned.
DEVICE_BYTES, PLANNED_TOKENS = 141e9, (4096, 16384, 65536)
# The share of it that JAX takes by default, and one to be had with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9.
POOL_SHARES = (0.75, 0.9)
# The programs that answer conversations, by the first word of their names.
TEXT_KINDS = ("prefill", "decode", "verify")
# Bytes from which a layer's weight is worth watching.
SMALLEST_WATCHED = 1 << 22


@dataclass(frozen=True)
class Row:
    """One compiled program, or why it did not compile."""

    program: str
    experts: str
    compile_seconds: float = 0.0
    argument_gb: float = 0.0
    temp_gb: float = 0.0
    largest_gb: float = 0.0
    largest_op: str = ""
    kernels: int = 0
    launches: int = 0
    copies: dict[str, int] = field(default_factory=dict)
    # How often each kind runs, and the bytes that one device sends for it.
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    # What the devices that exchange with each other make together.
    tokens: int = 1
    # Rows and slots of its cache.
    cache: tuple[int, int] | None = None
    error: str = ""


def missing_wheels() -> list[str]:
    """What to install with pip before anything can be compiled for CUDA."""
    return [names for module, names in WHEELS.items() if not _importable(module)]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compiled_row(target: Target, program: Program, experts: str, dump: Path | None) -> Row:
    """Compile one program and read its figures."""
    try:
        with ExitStack() as stack:
            for patch in gpu_branches(target, experts == "tokamax"):
                stack.enter_context(patch)
            jax.clear_caches()
            lowered = program.lower()
            start = time.perf_counter()
            compiled = lowered.compile()
            seconds = time.perf_counter() - start
    except Exception as error:
        return Row(program.name, experts, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    text = compiled.as_text()
    if dump:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{program.name}-{experts}.hlo".replace(" ", "_").replace(",", "")).write_text(text)
    memory, module = compiled.memory_analysis(), Module(text)
    largest, op = module.largest()
    return Row(
        program=program.name,
        experts=experts,
        compile_seconds=seconds,
        argument_gb=memory.argument_size_in_bytes / 1e9,
        temp_gb=memory.temp_size_in_bytes / 1e9,
        largest_gb=largest / 1e9,
        largest_op=op,
        kernels=module.kernels(),
        launches=module.launches(),
        copies=module.copies(watched(target, program)),
        collectives=module.collectives(),
        tokens=program.tokens // groups(target, program),
        cache=program.cache,
    )


def groups(target: Target, program: Program) -> int:
    """How many groups of devices each run their own rows of a program: what travels does so within a group."""
    sizes = dict(target.mesh.shape)
    rows = split_over("batch", program.cache[0], sizes) if program.cache else ()
    return prod(sizes[axis] for axis in rows if axis not in ("expert", "tensor"))


def watched(target: Target, program: Program) -> dict[int, str]:
    """Sizes in bytes of what must not be copied: the larger weights of the part, a layer each, and its cache."""
    named = []
    for name, leaf, stacked in weights(target, program.part):
        size = prod(leaf.shape[stacked:]) * target.dtype.itemsize
        if size >= SMALLEST_WATCHED:
            named.append((size, name))
    if program.cache:
        text, (rows, slots) = getattr(target.config, program.part).text, program.cache
        layer = rows * text.num_kv_heads * slots * text.head_dim * target.dtype.itemsize
        named += [(layer, "layer's cache"), (layer * text.num_layers, "whole cache")]
    return {size: " or ".join(name for other, name in named if other == size) for size, _ in named}


def weights(target: Target, part: str) -> Iterator[tuple[str, Any, bool]]:
    """Name and array of each parameter of a part, and whether it is a stack, of which a program reads one at a time."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(target.declarations[part].shapes):
        names = [key.key for key in path]
        stacked = bool({"layers", "blocks"} & set(names)) or names[-2:-1] == ["code_predictor"]
        name = "/".join(names).removesuffix("/weight")
        yield (f"layer's {name.replace('layers/', '').replace('blocks/', '')}" if stacked else name), leaf, stacked


def gpu_branches(target: Target, tokamax: bool) -> list[Any]:
    """Patches under which code that asks for the backend takes its GPU branch, with or without tokamax."""
    patches = [
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch("jax.extend.backend.get_default_device", return_value=target.device),
    ]
    if not tokamax:
        patches.append(mock.patch.object(moe, "find_spec", return_value=None))
    return patches


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    titles = "program experts compile,s arguments,GB temporaries,GB largest,array,GB kernels launches copies".split()
    lines = ["| " + " | ".join(title.replace(",", " ") for title in titles) + " |", "|---" * len(titles) + "|"]
    for r in rows:
        if r.error:
            lines.append(f"| {r.program} | {r.experts} | {r.error.replace('|', '/')} |" + " |" * 6)
            continue
        copies = ", ".join(f"{count} {name}" for name, count in r.copies.items()) or "none"
        lines.append(
            f"| {r.program} | {r.experts} | {r.compile_seconds:.1f} | {r.argument_gb:.1f} | {r.temp_gb:.3f} "
            f"| {r.largest_gb:.3f} {r.largest_op} | {r.kernels} | {r.launches} | {copies} |"
        )
    return "\n".join(lines)


def mesh_table(rows: list[Row]) -> str:
    """The rows of several devices as Markdown: all sizes are of one device."""
    titles = ("program", "arguments GB", "temporaries GB", "largest array GB", "launches", "collectives")
    titles = (*titles, "kB sent, a token")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in rows:
        if r.error:
            lines.append(f"| {r.program} | {r.error.replace('|', '/')} |" + " |" * 5)
            continue
        moved = ", ".join(f"{count} {kind}" for kind, (count, _) in r.collectives.items()) or "none"
        # What one device sends, over the tokens that all devices which exchange with it make together.
        kilobytes = sum(size for _, size in r.collectives.values()) / r.tokens / 1e3
        lines.append(
            f"| {r.program} | {r.argument_gb:.1f} | {r.temp_gb:.3f} | {r.largest_gb:.3f} {r.largest_op} "
            f"| {r.launches} | {moved} | {kilobytes:.1f} |"
        )
    return "\n".join(lines)


def plan(target: Target, sizes: dict[str, int], rows: list[Row]) -> str:
    """A line of Markdown: what a device of a mesh holds, and how many conversations all devices have room for.

    Beside the weights: the cache while it grows, one prompt in flight (whole on each device), and temporaries of the
    programs `rows`. Two numbers each: with JAX's usual share of the memory, and with the larger one.
    """
    parts = [
        describe_part(name, declaration, target.config, {}, str(target.dtype))
        for name, declaration in target.declarations.items()
    ]
    weights = sum(part.weight_bytes(sizes) for part in parts)

    def needed(count: int, tokens: int) -> float:
        cache = sum(part.most_cache_bytes(sizes, count, tokens) for part in parts)
        return weights + cache + temporaries(rows, count, capacity_for(tokens))

    def fitting(tokens: int, share: float) -> int:
        count = 0
        while needed(count + _devices(sizes), tokens) <= share * DEVICE_BYTES:
            count += _devices(sizes)
        return count

    cells = (" / ".join(str(fitting(tokens, share)) for share in POOL_SHARES) for tokens in PLANNED_TOKENS)
    return f"| {mesh_name(sizes)} | {_devices(sizes)} | {weights / 1e9:.1f} | {' | '.join(cells)} |"


def temporaries(rows: list[Row], count: int, slots: int) -> float:
    """Bytes of temporaries on a device that no program of `rows` exceeds for `count` conversations of `slots` slots.

    Nothing grows faster than rows times slots, so every program that was compiled for fewer bounds the larger one, and
    of a kind the tightest bound counts. A prompt is prefilled alone; speech is not made of so many at once.
    """
    bounds: dict[str, float] = {}
    for row in rows:
        kind = row.program.split()[0]
        prompt = kind == "prefill"
        if kind not in TEXT_KINDS or row.error or row.cache is None or (prompt and row.cache[0] > 1):
            continue
        growth = (1 if prompt else count) * slots / (row.cache[0] * row.cache[1])
        bounds[kind] = min(bounds.get(kind, float("inf")), row.temp_gb * 1e9 * max(1.0, growth))
    return max(bounds.values(), default=0.0)


def _devices(sizes: dict[str, int]) -> int:
    return prod(sizes.values())


def main() -> int:
    """Compile what the command line asks for, print the table, and fail if anything did not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="full", help="configuration of scripts/small/configs.py")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mesh", default="", help="compile for several H200s, such as expert=4,data=2")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    parser.add_argument("--experts", choices=("both", "tokamax", "tiled"), default="both")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--dump", type=Path, help="write each optimised HLO to this folder")
    options = parser.parse_args()
    if missing := missing_wheels():
        print(f"cannot compile for CUDA here; first: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    backends = ("tokamax", "tiled") if options.experts == "both" else (options.experts,)
    if "tokamax" in backends and not _importable("tokamax"):
        print("tokamax is not installed (pip install tokamax): left out", file=sys.stderr)
        backends = tuple(b for b in backends if b != "tokamax")
    target = h200(options.shape, options.dtype, parse_mesh(options.mesh) if options.mesh else None)
    print(f"jax {jax.__version__}, {options.shape}, {options.dtype}", file=sys.stderr)
    rows = []
    for program in mesh_programs(target) if options.mesh else programs(target):
        if options.only in program.name:
            for experts in backends if program.routed else ("",):
                rows.append(compiled_row(target, program, experts, options.dump))
                print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
    print(mesh_table(rows) if options.mesh else table(rows))
    if options.mesh:
        lengths = " | ".join(f"conversations of {tokens} tokens" for tokens in PLANNED_TOKENS)
        print(f"\n| mesh | H200s | weights, GB a device | {lengths} |\n" + "|---" * (3 + len(PLANNED_TOKENS)) + "|")
        print(plan(target, parse_mesh(options.mesh), rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
