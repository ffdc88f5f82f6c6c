"""Measure systems in turn, and print their figures side by side.

Every system runs in a process of its own. Where all fit, they are measured in turn: one repetition of each, in an order
that is reversed every time, so that whatever else the machine does affects all of them. For tiny, medium and large all
load the same checkpoint in the same type. For "full" (the public 30B-A3B) each makes its own weights on the device, one
system after the other: shapes and type are the same, values are not.

Figures are medians over the repetitions after one warm-up, which also compiles: compile time is the warm-up less the
median repetition. The modules `text`, `speech` and `drafting` define a repetition and what their figures mean: `ours`
and `theirs` build a `System`, `figures` computes figures from the median seconds of a repetition's parts, `ROWS` are
the lines of the table, `title` its first line.
"""

import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from scripts.bench.worker import ROOT, Worker

# A line of a table: its label, the figure, the factor that gives the unit of the label, the format.
Row = tuple[str, str, float, str]
COMMON_ROWS: tuple[Row, ...] = (
    ("compile, s", "compile_seconds", 1.0, ".1f"),
    ("peak memory, MB", "peak_bytes", 1e-6, ".1f"),
)


def run(module: ModuleType, options: Any) -> dict[str, dict[str, Any]]:
    """Figures by system: "ours", and those that `options.run` names."""
    checkouts = {"ours": ROOT}
    if options.run.against:
        checkouts["hf"] = ROOT
    if options.run.beside:
        checkouts["beside"] = options.run.beside.resolve()
    with tempfile.TemporaryDirectory() as folder:
        directory, figures = None, {}
        if options.run.shape != "full":
            from scripts.small.checkpoint import make_checkpoint

            directory = make_checkpoint(Path(folder) / options.run.shape, options.run.shape)
        for group in [list(checkouts)] if directory else [[name] for name in checkouts]:
            workers = [Worker(name, module, options, directory, checkouts[name]) for name in group]
            for _ in range(1 + options.run.repetitions):
                for worker in workers:
                    worker.measure()
                workers.reverse()
            figures |= {worker.name: worker.figures() for worker in workers}
            for worker in workers:
                worker.stop()
    return {name: figures[name] for name in checkouts}


def table(module: ModuleType, options: Any, figures: dict[str, dict[str, Any]]) -> str:
    """The figures of every system, and ours relative to those of the others."""
    others = [name for name in figures if name != "ours"]
    lines = [module.title(options), f"{'':<27}" + "".join(f"{name:>12}" for name in figures)]
    lines[-1] += "".join(f"{f'ours / {name}':>16}" for name in others)
    for label, key, scale, form in (*module.ROWS, *COMMON_ROWS):
        cells = [f"{format(f[key] * scale, form) if key in f else '-':>12}" for f in figures.values()]
        # Transformers does not compile: the excess of its first repetition is no figure to compare with.
        compared = [name for name in others if (key, name) != ("compile_seconds", "hf")]
        cells += [f"{figures['ours'][key] / figures[name][key]:>16.3g}" for name in compared if figures[name].get(key)]
        lines.append(f"{label:<27}" + "".join(cells))
    return "\n".join(lines)


def report(module: ModuleType, options: Any) -> None:
    """Measure, print the table, and write the JSON if asked for."""
    figures = run(module, options)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name, known in figures.items():
        about = ("checkout", "device", "jax", "transformers", "torch")
        print(f"{name}: " + ", ".join(f"{key} {known[key]}" for key in about if key in known))
    print(table(module, options, figures))
    write_json(options.run.json, options, figures)


def write_json(path: Path | None, options: Any, figures: Any) -> None:
    """Write options and figures to a file, if there is one to write."""
    if path:
        values = {"options": asdict(options), "figures": figures}
        path.write_text(json.dumps(values, indent=1, allow_nan=False, default=str))
