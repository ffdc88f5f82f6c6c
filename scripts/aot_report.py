"""Compile the Thinker's programs for one H200 on a machine that has no GPU, and report what the compiler made of them.

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm
    pip install tokamax                                # or leave it out: then experts run as tiles, as they would there
    python scripts/aot_report.py --json report.json

The real entry points are lowered with shapes alone, so the full 30B-A3B model needs neither its weights nor memory for
them. Per program: compile seconds, gigabytes of arguments and temporaries, the largest array that a launch writes anew,
kernels in the program, launches (those in loops of known length counted every time; a chunk of decode counts one step),
and how many kernels do nothing but copy as many bytes as a layer's weight, a layer's cache or a whole cache holds. Of a
branch, the longer arm counts, so launches of tiles are an upper bound.

Nothing is timed. The compiler neither autotunes without a device nor can it use cuDNN, so kernels that depend on
either differ on the machine itself. `h200_target_config.textproto` beside this file describes the GPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import jax
import jax.numpy as jnp
from hlo_report import Module
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny_configs import config_dict

from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.decode.generate import DecodeState, Request, decode_chunk, prefill
from omni_jax.decode.media import encode_audio, encode_vision
from omni_jax.decode.sampling import Sampling
from omni_jax.models.param import Graph, declare, init_params
from omni_jax.models.thinker import Thinker
from omni_jax.ops import moe
from omni_jax.ops.cache import KVCache, slots_for

TARGET = Path(__file__).resolve().parent / "h200_target_config.textproto"
WHEELS = {
    "jax_cuda13_plugin": "jax-cuda13-plugin",
    "jax_plugins.xla_cuda13": "jax-cuda13-pjrt",
    "nvidia.cu13": "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm",
}
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
    error: str = ""


@dataclass(frozen=True)
class Target:
    """What a program is lowered for: the model, and arrays that exist in shape only, on the described GPU."""

    config: ThinkerConfig
    graph: Graph
    device: Any
    sharding: NamedSharding
    dtype: Any

    def array(self, *shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding)

    def params(self) -> dict:
        return jax.tree.map(lambda p: self.array(*p.shape, dtype=self.dtype), self.graph.shapes)

    def keys(self, rows: int) -> Any:
        return self.array(rows, dtype=jax.random.key(0).dtype)

    def values(self) -> dict:
        return {name: self.array() for name in Sampling().values()}


def missing_wheels() -> list[str]:
    """What to install with pip before anything can be compiled for CUDA."""
    return [names for module, names in WHEELS.items() if not _importable(module)]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def h200(shape: str, dtype: Any) -> Target:
    """One H200 as the compiler sees it, and the Thinker of configuration `shape`."""
    topology: Any = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("data",))
    mesh = Mesh(mesh.devices, ("data",), axis_types=(AxisType.Auto,))
    config = OmniConfig.from_hf(config_dict(shape)).thinker
    return Target(
        config, declare(Thinker, config), topology.devices[0], NamedSharding(mesh, PartitionSpec()), jnp.dtype(dtype)
    )


def lower_prefill(target: Target, rows: int, tokens: int) -> Any:
    """The prompt's program, [rows, tokens]."""
    i32 = jnp.int32
    request = Request(
        token_ids=target.array(rows, tokens, dtype=i32),
        length=target.array(rows, dtype=i32),
        position_ids=target.array(3, rows, tokens),
        rope_delta=target.array(rows),
        budget=target.array(rows, dtype=i32),
        keys=target.keys(rows),
        stop_ids=target.array(1, dtype=i32),
        values=target.values(),
    )
    plan = Sampling().plan(target.config.text.vocab_size)
    slots = slots_for(tokens)
    return prefill.lower(target.params(), request, None, graph=target.graph, plan=plan, slots=slots)


def lower_decode(target: Target, rows: int, slots: int, unroll: int) -> Any:
    """A chunk of decode steps for `rows` rows with `slots` cache slots."""
    text, i32 = target.config.text, jnp.int32
    kv = target.array(text.num_layers, rows, text.num_kv_heads, slots, text.head_dim, dtype=target.dtype)
    state = DecodeState(
        cache=KVCache(kv, kv, target.array(rows, dtype=i32)),
        token=target.array(rows, dtype=i32),
        rope_delta=target.array(rows),
        done=target.array(rows, dtype=jnp.bool_),
        remaining=target.array(rows, dtype=i32),
        seen=target.array(rows, 0, dtype=jnp.bool_),
        keys=target.keys(rows),
    )
    steps, stop_ids = target.array(dtype=i32), target.array(1, dtype=i32)
    plan = Sampling().plan(text.vocab_size)
    return decode_chunk.lower(
        target.params(), state, steps, stop_ids, target.values(), graph=target.graph, plan=plan, unroll=unroll
    )


def lower_vision(target: Target, rows: int, patches: int) -> Any:
    """The vision encoder for `rows` frames."""
    shape = (rows, patches, target.config.vision.patch_dim)
    grid = target.array(rows, 2, dtype=jnp.int32)
    return encode_vision.lower(target.params(), target.array(*shape), grid, graph=target.graph)


def lower_audio(target: Target, windows: int) -> Any:
    """The audio encoder for `windows` full attention windows."""
    audio = target.config.audio
    counts = target.array(windows, audio.window_chunks, dtype=jnp.int32)
    mel = target.array(windows, audio.window_chunks, audio.mel_bins, audio.chunk_frames)
    return encode_audio.lower(target.params(), mel, counts, counts, graph=target.graph)


@dataclass(frozen=True)
class Program:
    """A program's name, whether it has experts, its cache as (rows, slots), and how it is lowered."""

    name: str
    routed: bool
    cache: tuple[int, int] | None
    lower: Callable[[], Any]


def lower_init(target: Target) -> Any:
    """Random weights, made on the device."""
    make = partial(init_params, Thinker, target.config, dtype=target.dtype)
    return jax.jit(make, out_shardings=target.sharding).lower()


def programs(target: Target) -> Iterator[Program]:
    """Every program reported."""
    L = target.config.text.num_layers
    for tokens in (512, 4096, 8192):
        yield Program(f"prefill 1x{tokens}", True, (1, slots_for(tokens)), partial(lower_prefill, target, 1, tokens))
    for rows, slots in ((1, 2048), (8, 2048), (32, 4096)):
        for form, unroll in (("scan", 1), ("unroll", L)):
            name = f"decode {rows}, {slots} slots, {form}"
            yield Program(name, True, (rows, slots), partial(lower_decode, target, rows, slots, unroll))
    for patches in (1024, 4096):
        yield Program(f"vision 1 frame, {patches} patches", False, None, partial(lower_vision, target, 1, patches))
    yield Program("random weights", False, None, partial(lower_init, target))
    yield Program("audio 4 windows", False, None, partial(lower_audio, target, 4))


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
        copies=module.copies(watched(target, program.cache)),
    )


def watched(target: Target, cache: tuple[int, int] | None) -> dict[int, str]:
    """Sizes in bytes of what must not be copied: each layer's larger weights, and a cache of (rows, slots)."""
    named = []
    for name, stack in (("", target.graph.shapes["layers"]), ("vision ", target.graph.shapes["vision"]["blocks"])):
        for path, leaf in jax.tree_util.tree_leaves_with_path(stack):
            size = prod(leaf.shape[1:]) * target.dtype.itemsize
            if size >= SMALLEST_WATCHED:
                named.append((size, f"layer's {name}{'/'.join(key.key for key in path).removesuffix('/weight')}"))
    if cache:
        text, (rows, slots) = target.config.text, cache
        layer = rows * text.num_kv_heads * slots * text.head_dim * target.dtype.itemsize
        named += [(layer, "layer's cache"), (layer * text.num_layers, "whole cache")]
    return {size: " or ".join(name for other, name in named if other == size) for size, _ in named}


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


def main() -> int:
    """Compile what the command line asks for, print the table, and fail if anything did not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="full", help="configuration of scripts/tiny_configs.py")
    parser.add_argument("--dtype", default="bfloat16")
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
    target = h200(options.shape, options.dtype)
    print(f"jax {jax.__version__}, {options.shape}, {options.dtype}", file=sys.stderr)
    rows = []
    for program in programs(target):
        if options.only in program.name:
            for experts in backends if program.routed else ("",):
                rows.append(compiled_row(target, program, experts, options.dump))
                print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
