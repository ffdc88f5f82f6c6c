"""The sections of the GPU check: each takes the shape, "full" or "tiny", and returns tables, figures and errors."""

import importlib.metadata
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.bench.options import Run, Speech, Text

Table = list[list[Any]]


def versions(shape: str) -> dict:
    """What runs here."""
    import jax

    names = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "tokamax", "torch", "transformers",
             "nvidia-cudnn-cu13", "nvidia-cublas")  # fmt: skip
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    found |= {
        "devices": len(jax.devices()),
        "device": device.device_kind,
        "memory GB": memory.get("bytes_limit", 0) / 1e9,
        "cuDNN loaded": cudnn_version(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    return {"tables": {"Versions": [["", ""], *([name, value] for name, value in found.items())]}}


def cudnn_version() -> str:
    """The cuDNN that JAX loads, or why there is none."""
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return "none"
    try:
        return str(cuda_versions.cudnn_get_version()) if cuda_versions else "none"
    except RuntimeError as error:
        return str(error)


def correctness(shape: str) -> dict:
    """Backends, attention, positions, cache, a tiny Thinker, Talker and vocoder against NumPy and the CPU."""
    from scripts.gpu import correct, correct_speech

    findings = [*correct.all_findings(), *correct_speech.all_findings()]
    rows = [[f.name, f"{f.error:.2e}", f"{f.bound:.0e}", "yes" if f.ok else "NO"] for f in findings]
    failed = [f.name for f in findings if not f.ok]
    return {
        "tables": {"Correctness": [["compared", "relative error", "bound", "holds"], *rows]},
        "findings": [asdict(f) for f in findings],
        "error": f"out of bounds: {', '.join(failed)}" if failed else "",
    }


def kernels(shape: str) -> dict:
    """Copy bandwidth, products of one row, and one layer of experts by each backend."""
    from omni_jax.config import OmniConfig
    from scripts.gpu import speed
    from scripts.small.configs import config_dict

    config = OmniConfig.from_hf(config_dict(shape)).thinker
    full = shape == "full"
    timings, errors = [], []
    for step in (
        lambda: speed.bandwidth(4.0 if full else 0.01),
        lambda: speed.one_row_products(config),
        *(
            lambda rows=rows: speed.expert_backends(config, (rows,))
            for rows in (1, 4, 16, 512, 8192)[: 5 if full else 3]
        ),
    ):
        attempt(step, timings, errors)
    return timing_tables("Kernels", timings, errors)


def model(shape: str) -> dict:
    """Prefill, decode as a loop and flat, and the kernels of a decode step, with random weights of the whole shape."""
    from scripts.gpu import speed

    full = shape == "full"
    made = speed.make_model(shape, "bfloat16" if full else "float32")
    L = made.config.text.num_layers
    timings, errors = [], []
    attempt(lambda: speed.prefills(made, (512, 4096) if full else (16,)), timings, errors)
    # The flat program comes last: it takes longest to compile.
    cases = (
        ((1, 2048, 1), (8, 2048, 1), (32, 4096, 1), (1, 2048, 4), (1, 2048, L)) if full else ((2, 512, 1), (1, 512, L))
    )
    for rows, capacity, unroll in cases:
        attempt(
            lambda rows=rows, capacity=capacity, unroll=unroll: [speed.decodes(made, rows, capacity, unroll)],
            timings,
            errors,
        )
    found = timing_tables("Model", timings, errors)
    busiest: list = []
    attempt(lambda: speed.kernel_times(made, 1, 2048 if full else 512, 1), busiest, errors)
    found["tables"]["One decode chunk, one row: where its time goes"] = kernel_table(busiest)
    found["error"] = "; ".join(errors)
    return found


def speech(shape: str) -> dict:
    """The Talker's prompt, whole frames as a loop and flat, the vocoder, with random weights of the whole shape."""
    from scripts.gpu import speed_speech as speed

    full = shape == "full"
    dtype, capacity = ("bfloat16", 1024) if full else ("float32", 256)
    sizes = ((1, 4), (1, 16), (1, 64), (8, 4), (8, 16)) if full else ((1, 4),)
    timings, errors, busiest = [], [], []
    attempt(lambda: speed.sounds(shape, dtype, sizes), timings, errors)
    made = speed.make_speaker(shape, dtype)
    attempt(lambda: speed.prompts(made, ((1, 512), (8, 512)) if full else ((1, 16),)), timings, errors)
    # The flat programs come last: they take longest to compile.
    flat = made.config.text.num_layers
    for rows, unroll in ((1, 1), (8, 1), (1, flat), (8, flat)) if full else ((1, 1),):
        attempt(lambda rows=rows, unroll=unroll: [speed.frames(made, rows, capacity, unroll)], timings, errors)
    attempt(lambda: speed.frame_kernels(made, 1, capacity, 1), busiest, errors)
    found = timing_tables("Speech", timings, errors)
    found["tables"]["One chunk of frames, one row: where its time goes"] = kernel_table(busiest)
    return found


def bench(shape: str) -> dict:
    """Our Thinker and transformers', by scripts/bench."""
    from scripts.bench import text

    options = Text(prompt=512, new=64) if shape == "full" else Text(prompt=16, new=10)
    return side_by_side(text, options, shape, repetitions=3)


def speech_bench(shape: str) -> dict:
    """Our spoken replies and transformers', by scripts/bench."""
    from scripts.bench import speech

    options = Speech(new=16, frames=24) if shape == "full" else Speech(prompt=16, new=10, frames=4)
    # Few repetitions: transformers runs one program per code, and a repetition speaks a whole reply twice.
    return side_by_side(speech, options, shape, repetitions=2)


def side_by_side(module: ModuleType, options: Any, shape: str, repetitions: int) -> dict:
    """What `module` of scripts/bench measures, with transformers where it is installed."""
    from scripts.bench import compare

    full = shape == "full"
    run = Run("full", "bfloat16", repetitions) if full else Run("tiny", "float32", 1)
    errors, text, figures = [], [], {}
    # Without transformers only if the comparison fails: loading the whole shape twice takes minutes.
    for against in ("hf", None) if find_spec("transformers") and find_spec("torch") else (None,):
        try:
            case = replace(options, run=replace(run, against=against))
            figures = compare.run(module, case)
            text = [compare.table(module, case, figures)]
            break
        except Exception as error:
            traceback.print_exc()
            errors.append(f"against {against}: {type(error).__name__}: {error}")
    return {"tables": {}, "text": text, "figures": figures, "error": "; ".join(errors)}


def attempt(step: Callable[[], list], results: list, errors: list[str]) -> None:
    """Add what `step` returns to `results`, or what went wrong to `errors`."""
    try:
        results += step()
    except Exception as error:
        traceback.print_exc()
        errors.append(f"{type(error).__name__}: {str(error)[:300]}")


def kernel_table(busiest: list[tuple[str, float, int]]) -> Table:
    """Kernels by the time that they took."""
    return [["kernel", "ms", "calls"], *([name[:90], f"{ms:.3f}", calls] for name, ms, calls in busiest)]


def timing_tables(title: str, timings: list, errors: list[str]) -> dict:
    """A section of timings."""
    rows = [
        [t.name, f"{t.milliseconds:.3f}", f"{t.rate:,.0f} {t.unit}" if t.rate else "", f"{t.first_seconds:.1f}"]
        for t in timings
    ]
    table = [["measured", "ms", "rate", "first call, s"], *rows]
    return {"tables": {title: table}, "timings": [asdict(t) for t in timings], "error": "; ".join(errors)}


SECTIONS: dict[str, Callable[[str], dict]] = {
    "versions": versions, "correctness": correctness, "kernels": kernels, "bench": bench, "model": model,
    "speech": speech, "speech_bench": speech_bench,
}  # fmt: skip


def run_section(name: str, shape: str, folder: str) -> None:
    """Run one section in this process and write its results."""
    start = time.perf_counter()
    found: dict[str, Any]
    try:
        found = SECTIONS[name](shape)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    found["seconds"] = time.perf_counter() - start
    Path(folder, f"{name}.json").write_text(json.dumps(found, indent=1))
