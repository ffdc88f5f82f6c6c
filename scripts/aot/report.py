"""Compile the model's programs for one H200 on a machine that has no GPU, and report what the compiler made of them.

    pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm
    pip install tokamax                       # optional: without it programs run as on a machine without tokamax
    python -m scripts.aot report --json report.json
    python -m scripts.aot report --only speech            # Talker and Code2Wav alone
    python -m scripts.aot report --mesh expert=4          # for four devices: sizes of one, and what they exchange
    python -m scripts.aot report --only "decode 1," --kernels 20    # the kernels that take longest, and named parts

`programs` lists the programs. Reported for each: compile seconds, gigabytes of arguments and temporaries, the largest
array that a launch writes anew, gigabytes read and written and their ratio to what must be read, kernels in the
program, launches (those in loops of known length counted every time; a chunk of decoding counts one step, one of speech
one frame), the milliseconds that are expected from these (`traffic`) if all launches are part of a command buffer (a
CUDA graph, 1.5 us each) and if the host makes each of them (3 us, an assumption), and the number of kernels that only
copy as many bytes as a weight (one layer of stacked ones), a layer's cache or a whole cache holds. Of a branch the
longer arm counts, so launches of tiles are an upper bound. For several devices: what one device sends, if every
collective is a ring of the devices that take part in it, per token that these devices make together.

Programs in which experts run are compiled twice, as on a machine with tokamax ("tokamax") and on one without it
("tiled"): there is then no kernel of tokamax at all, so experts run as tiles, and attention is XLA's.

Nothing is timed. The compiler neither autotunes without a device nor can it use cuDNN, so kernels that depend on
either differ on the machine itself.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from json import dumps
from math import prod
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax

from omni_jax.models.param import is_float
from omni_jax.sharding import split_over
from omni_jax.weights.mesh_text import parse_mesh
from scripts.aot.hlo import Module
from scripts.aot.kernels import costliest, named_parts
from scripts.aot.programs import Program, Target, h200, mesh_programs, programs
from scripts.aot.tables import Row, kernel_tables, mesh_table, plan, plan_heading, table, train_table
from scripts.aot.traffic import HOST_LAUNCH, Judge, expected_share
from scripts.aot.train_programs import RECIPES, held, train_programs

WHEELS = {
    "jax_cuda13_plugin": "jax-cuda13-plugin",
    "jax_plugins.xla_cuda13": "jax-cuda13-pjrt",
    "nvidia.cu13": "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm",
}
# The kind of the described device, as Pallas knows it.
KIND = "NVIDIA H200"
# Bytes from which a layer's weight is watched.
SMALLEST_WATCHED = 1 << 22


def missing_wheels() -> list[str]:
    """The wheels to install with pip before anything can be compiled for CUDA."""
    return [names for module, names in WHEELS.items() if not _importable(module)]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compiled_row(target: Target, program: Program, experts: str, dump: Path | None, kernels: int = 0) -> Row:
    """Compile one program and read its figures, and those of the `kernels` slowest kernels."""
    try:
        with ExitStack() as stack:
            for patch in gpu_branches(target, experts != "tiled"):
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
    judge = Judge(module, _share(target, program))
    moved = judge.total()
    return Row(
        program=program.name,
        experts=experts,
        compile_seconds=seconds,
        argument_gb=memory.argument_size_in_bytes / 1e9,
        temp_gb=memory.temp_size_in_bytes / 1e9,
        new_gb=(memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9,
        largest_gb=largest / 1e9,
        largest_op=op,
        kernels=module.kernels(),
        launches=module.launches(),
        copies=module.copies(watched(target, program)),
        collectives=module.collectives(),
        read_gb=moved.read / 1e9,
        written_gb=moved.written / 1e9,
        needed_gb=needed(target, program) / 1e9,
        expected_ms=1e3 * judge.seconds(),
        hosted_ms=1e3 * judge.seconds(HOST_LAUNCH),
        tokens=program.tokens // groups(target, program),
        cache=program.cache,
        slowest=costliest(judge, kernels),
        parts=named_parts(judge) if kernels else [],
    )


def _share(target: Target, program: Program) -> float:
    """The share of a layer's experts that a program is expected to read."""
    if not program.routed:
        return 1.0
    text = getattr(target.config, program.part).text
    return expected_share(program.routed, text.num_experts, text.experts_per_token)


def needed(target: Target, program: Program) -> float:
    """Bytes that a step of the Thinker's decoding must read: layers and head, chosen experts, the cache; else 0."""
    if not program.name.startswith(("decode", "verify")) or program.cache is None:
        return 0
    total, share, text = 0.0, _share(target, program), target.config.thinker.text
    for path, leaf in jax.tree_util.tree_leaves_with_path(target.declarations["thinker"].shapes):
        names = [key.key for key in path]
        if names[0] in ("layers", "lm_head", "norm"):
            size = prod(leaf.shape) * itemsize(target, leaf)
            total += size * (share if "moe" in names and "router" not in names else 1)
    rows, slots = program.cache
    return total + 2 * text.num_layers * rows * text.num_kv_heads * slots * text.head_dim * target.dtype.itemsize


def itemsize(target: Target, leaf: Any) -> int:
    """Bytes of one number of a parameter: floats are in the type of the target."""
    return (target.dtype if is_float(leaf.dtype) else leaf.dtype).itemsize


def groups(target: Target, program: Program) -> int:
    """The number of groups of devices that each run their own rows of a program; devices exchange within a group."""
    sizes = dict(target.mesh.shape)
    rows = split_over("batch", program.cache[0], sizes) if program.cache else ()
    return prod(sizes[axis] for axis in rows if axis not in ("expert", "tensor"))


def watched(target: Target, program: Program) -> dict[int, str]:
    """What must not be copied, by its bytes: the larger weights of the part, one layer each, and its cache."""
    named = []
    for name, leaf, stacked in weights(target, program.part):
        size = prod(leaf.shape[stacked:]) * itemsize(target, leaf)
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
    """Patches under which code that reads the platform takes its GPU branch, with or without tokamax.

    JAX has no setting for the platform of a trace: it is that of the default device, and a device that exists as a
    description only cannot be the default one.
    """
    patches: list[Any] = [
        mock.patch.object(jax, "default_backend", return_value="gpu"),
        mock.patch("jax.extend.backend.get_default_device", return_value=target.device),
    ]
    if _importable("jax._src.pallas.triton.gpu_info"):
        # Pallas asks for the device in its own way.
        patches.append(mock.patch("jax._src.pallas.triton.gpu_info.get_device_kind", return_value=KIND))
    if not tokamax:
        patches.append(without("tokamax"))
    return patches


@contextmanager
def without(package: str) -> Iterator[None]:
    """As if a package were not installed: nobody finds or imports it."""
    imported, before = package in sys.modules, sys.modules.get(package)
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]
        if imported:
            sys.modules[package] = before  # pyright: ignore[reportArgumentType]


def report(
    shape: str = "full",
    dtype: str = "bfloat16",
    mesh: str = "",
    only: str = "",
    experts: Literal["both", "tokamax", "tiled"] = "both",
    quantize: Literal["int8"] | None = None,
    kernels: int = 0,
    json: Path | None = None,
    dump: Path | None = None,
) -> int:
    """Compile the model's programs for H200s, and print what the compiler made of them.

    Args:
        shape: configuration of scripts/small/configs.py.
        dtype: of weights and activations.
        mesh: compile for several H200s, such as expert=4,data=2.
        only: programs whose name contains this.
        experts: as on a machine with tokamax, without it (tiled: also in attention), or both, one after the other.
        quantize: the routed experts in eight bits.
        kernels: print so many kernels of each program, those of the most expected time, and totals by named part.
        json: write the rows here too.
        dump: write the optimised HLO of every program to this folder.
    """
    if missing := missing_wheels():
        print(f"cannot compile for CUDA here; first: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    sizes = parse_mesh(mesh) if mesh else None
    target = h200(shape, dtype, sizes, quantize)
    print(f"jax {jax.__version__}, {shape}, {dtype}, {quantize or 'not quantised'}", file=sys.stderr)
    chosen = [p for p in (mesh_programs(target) if sizes else programs(target)) if only in p.name]
    rows = compiled_rows(target, chosen, backends(experts), dump, kernels)
    print(mesh_table(rows) if sizes else table(rows))
    if kernels:
        print(kernel_tables(rows))
    if sizes:
        print("", *plan_heading(), plan(target, sizes, rows), sep="\n")
    if json:
        json.write_text(dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.error for row in rows))


def train(
    mesh: str,
    recipes: tuple[str, ...] = tuple(RECIPES),
    shape: str = "full",
    dtype: str = "bfloat16",
    rows: int = 1,
    tokens: int = 4096,
    experts: Literal["tokamax", "tiled"] = "tokamax",
    json: Path | None = None,
    dump: Path | None = None,
) -> int:
    """Compile the programs of a training step for H200s, and print what memory they need and what they exchange.

    Args:
        mesh: the H200s, such as fsdp=8, or data=1 for one.
        recipes: what is trained; all that are known by default.
        shape: configuration of scripts/small/configs.py.
        dtype: of the computation and of what is not trained.
        rows: rows of a batch on each device.
        tokens: tokens of a row.
        experts: as on a machine with tokamax, or without it (tiled: also in attention).
        json: write the rows here too.
        dump: write the optimised HLO of every program to this folder.
    """
    if missing := missing_wheels():
        print(f"cannot compile for CUDA here; first: pip install {' '.join(missing)}", file=sys.stderr)
        return 2
    target = h200(shape, dtype, parse_mesh(mesh))
    print(f"jax {jax.__version__}, {shape}, {dtype}", file=sys.stderr)
    chosen = list(train_programs(target, recipes, rows * target.mesh.size, tokens))
    made = compiled_rows(target, chosen, backends(experts), dump)
    parts = zip(recipes, made[::2], made[1::2], strict=True)
    steps = [(name, held(target, name), add, update) for name, add, update in parts]
    print(train_table(mesh, f"{rows} x {tokens}", steps))
    if json:
        json.write_text(dumps([asdict(row) for row in made], indent=1))
    return int(any(row.error for row in made))


def backends(experts: str) -> tuple[str, ...]:
    """With tokamax, without it, or both: what can be compiled here of that which is asked for."""
    wanted = ("tokamax", "tiled") if experts == "both" else (experts,)
    if "tokamax" in wanted and not _importable("tokamax"):
        print("tokamax is not installed (pip install tokamax): left out", file=sys.stderr)
        return tuple(name for name in wanted if name != "tokamax")
    return wanted


def compiled_rows(
    target: Target, chosen: list[Program], machines: tuple[str, ...], dump: Path | None, kernels: int = 0
) -> list[Row]:
    """Compile programs, those with experts once for each of the machines; every row is printed when it is known."""
    rows = []
    for program in chosen:
        for experts in machines if program.routed else ("",):
            rows.append(compiled_row(target, program, experts, dump, kernels))
            print(dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
    return rows
