"""Measure text, speech, drafting, loading or scaling with random weights; and transformers beside the first three.

    python -m scripts.bench --shape medium --against hf
    python -m scripts.bench --speech --batch 8 --against hf
    python -m scripts.bench --speculative --new 129 --against hf
    python -m scripts.bench --speculative --model ckpt --drafter dflash --drafter eagle3 --prompts question.jsonl
    python -m scripts.bench --load --shape large
    python -m scripts.bench --scaling

Every system runs in a process of its own, and where both fit, they are measured in turn: one repetition of ours, one of
theirs, so that whatever else the machine does falls on both. For tiny and medium both load the same checkpoint in the
same type. For "full" (the public 30B-A3B shape) each makes its own weights on the device: shapes and type are the same,
values are not.

Figures are medians over the repetitions after one warm-up, which also compiles: the compile time is the warm-up less
the median repetition. `bench_text.py`, `bench_speech.py` and `bench_speculative.py` say what a repetition is, and what
their figures mean; drafters given by name are compared by `bench_drafters.py`, on prompts instead of repetitions.
`bench_load.py` measures what a host holds while it loads, `bench_scaling.py` meshes of more and more devices.
"""

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from scripts.bench.worker import Bench, Worker, kind

COMMON_ROWS = (("compile, s", "compile_seconds", 1.0, ".1f"), ("peak memory, MB", "peak_bytes", 1e-6, ".1f"))


def run(bench: Bench) -> dict[str, dict]:
    """Figures by system, measured in turn where both fit the machine."""
    systems = ["ours", "hf"] if bench.against else ["ours"]
    with tempfile.TemporaryDirectory() as folder:
        directory = None
        if bench.shape != "full":
            from scripts.small.checkpoint import make_checkpoint

            directory = make_checkpoint(Path(folder) / bench.shape, bench.shape)
        figures = {}
        for group in [systems] if directory else [[s] for s in systems]:
            workers = {system: Worker(system, bench, directory) for system in group}
            for _ in range(1 + bench.repetitions):
                for worker in workers.values():
                    worker.measure()
            for system, worker in workers.items():
                figures[system] = worker.figures()
                worker.stop()
    return figures


def table(bench: Bench, figures: dict[str, dict]) -> str:
    """The figures for people."""
    lines = [kind(bench).title(bench)]
    lines.append(
        f"{'':<27}" + "".join(f"{system:>12}" for system in figures) + ("   ours / hf" if "hf" in figures else "")
    )
    for label, key, scale, form in (*kind(bench).ROWS, *COMMON_ROWS):
        values = [f[key] * scale for f in figures.values()]
        cells = [f"{format(value, form):>12}" for value in values]
        # Transformers does not compile: what its first repetition takes more is no figure to compare with.
        ratio = f"{values[0] / values[1]:>12.3g}" if len(values) == 2 and key != "compile_seconds" else ""
        lines.append(f"{label:<27}" + "".join(cells) + ratio)
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for and print it."""
    import tyro  # here, because gpu_check.py uses the rest where only jax and flax are installed

    bench = tyro.cli(Bench, description=__doc__, config=(tyro.conf.UseAppendAction,))
    asked = {
        "scripts.bench.drafters": bench.drafter,
        "scripts.bench.loading": bench.load,
        "scripts.bench.scaling": bench.scaling,
    }
    if name := next((name for name, is_asked in asked.items() if is_asked), None):
        # Before JAX is imported: it may need other settings.
        module = import_module(name)
        from omni_jax.errors import OmniError

        try:
            return module.report(bench)
        except OmniError as error:
            sys.exit(f"bench.py: {error}")
    figures = run(bench)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for system, f in figures.items():
        print(f"{system}: " + ", ".join(f"{k} {f[k]}" for k in ("device", "jax", "transformers", "torch") if k in f))
    print(table(bench, figures))
    if bench.json:
        bench.json.write_text(json.dumps({"bench": {**asdict(bench), "json": None}, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
