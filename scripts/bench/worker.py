"""The parent's end of a measured process."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from omni_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SERVE = Path(__file__).resolve().parent / "serve.py"


class Worker:
    """A process in which `module` measures one system of one checkout; RuntimeError if it fails."""

    def __init__(self, name: str, module: ModuleType, options: Any, directory: Path | None, checkout: Path = ROOT):
        """name: "ours", "hf" or "beside". directory: the checkpoint that it loads, None for random weights."""
        self.name, self.module, self.options = name, module, options
        run = {**asdict(options.run), "beside": None, "json": None}
        request = {
            "module": module.__name__,
            "system": "theirs" if name == "hf" else "ours",
            "kind": type(options).__name__,
            "options": {**asdict(options), "run": run},
            "directory": str(directory) if directory else None,
        }
        command = [sys.executable, "-P", str(SERVE), json.dumps(request)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment(checkout), stdin=pipe, stdout=pipe, text=True
        )
        self.about = self._receive()
        self.samples: list[dict[str, Any]] = []

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"the process that measures {self.name!r} failed; its error is printed above")
        return json.loads(line)

    def measure(self) -> None:
        """Run one repetition and keep its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.samples.append(self._receive())

    def stop(self) -> None:
        """End the process, and release its memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def figures(self) -> dict[str, Any]:
        """Figures from the medians of all repetitions but the first, which compiles."""
        first, *rest = self.samples
        medians = {part: statistics.median(sample[part] for sample in rest) for part in first}
        return {
            **self.module.figures(self.options, medians),
            "compile_seconds": max(0.0, first["repetition"] - medians["repetition"]),
            "peak_bytes": rest[-1]["peak_bytes"],
            **self.about,
        }


def environment(checkout: Path) -> dict[str, str]:
    """Environment variables of a process that measures a checkout: memory as needed, and nothing compiled earlier."""
    if (
        not (checkout / "scripts" / "bench.py").is_file()
        and not (checkout / "scripts" / "bench" / "serve.py").is_file()
    ):
        raise InputError(f"{checkout}: has neither scripts/bench.py nor scripts/bench/serve.py; it cannot be measured")
    defaults = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {**defaults, **os.environ, "PYTHONPATH": str(checkout)}
