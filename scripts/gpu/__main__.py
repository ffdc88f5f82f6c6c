"""Check and measure on a GPU machine: correctness, then the table's programs, transformers, kernels and profiles.

    python -m scripts.gpu results/                         # the public 30B-A3B shape; needs 80 GB
    python -m scripts.gpu results/ --shape tiny            # the same steps, small: runs on CPU too
    python -m scripts.gpu results/ --only correctness text --minutes 4

Needs tyro, jax, flax and numpy; torch and transformers for the comparison, tokamax and qwix for the grouped kernels. It
ends within --minutes: sections come in the order of their importance, steps for which too little time is left are not
begun, and are named at the end. Each section runs in a process of its own, so that its memory is released and a crash
costs one step: its error is printed, and the exit status is 1.

The folder holds `results.json` and `summary.md`, written after each section, and while one runs `running.json`, written
after each of its steps. Compiled programs are kept in the system's temporary directory, or where
JAX_COMPILATION_CACHE_DIR says: a second call on the same machine compiles nothing again.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from scripts.gpu.report import errors, markdown, section, summary
from scripts.gpu.sections import SECTIONS
from scripts.gpu.steps import write_json

ROOT = Path(__file__).resolve().parents[2]
RUN_SECTION = "import sys; from scripts.gpu.sections import run_section; run_section(*sys.argv[1:])"
# With less left than this, a process would only start.
LEAST_SECONDS = 10.0
# Small programs are kept too. The device is this process' alone, and one pool from the start does not fall into pieces.
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "omni_jax_gpu_programs"),
    "JAX_ENABLE_COMPILATION_CACHE": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
}
Name = Literal[
    "versions", "correctness", "text", "speech", "kernel_correctness", "kernel_text", "kernel_speech", "reply", "start",
    "theirs", "int8", "kernels", "profiles",
]  # fmt: skip


def run_apart(name: str, shape: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one section in a process of its own, for at most `seconds`, and return what it found until its end."""
    file = folder / "running.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-c", RUN_SECTION, name, shape, str(file), str(time.time() + seconds)]
    environment = {**ENVIRONMENT, **os.environ, **SECTIONS[name].environment}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        code = None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    unread = {"errors": [], "left": ["all of it"], "running": ""}
    found = json.loads(file.read_text()) if file.exists() else unread
    file.unlink(missing_ok=True)
    at = f" in {found['running']}" if found["running"] else ""
    if code is None:
        found["left"].append(f"cut off after {seconds:.0f} s{at}")
    elif code:
        found["errors"].append(f"the process ended with {code}{at}")
    return found


def check(
    folder: Annotated[Path, tyro.conf.Positional],
    shape: Literal["full", "tiny"] = "full",
    only: tuple[Name, ...] = (),
    minutes: float = 9.0,
    limit: float | None = None,
) -> int:
    """Run the sections and summarise them.

    Args:
        folder: where results are written.
        shape: the public shape, or a small one for a machine without GPU.
        only: sections to run; all by default.
        minutes: after which the command has ended.
        limit: seconds that one section may take; by default each has its own limit.
    """
    deadline, folder = time.monotonic() + 60 * minutes, folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict] = {}
    for name in only or SECTIONS:
        own = SECTIONS[name].seconds if limit is None else limit
        seconds = min(own, deadline - time.monotonic())
        if seconds < LEAST_SECONDS:
            sections[name] = {"left": ["all of it"]}
        else:
            print(f"== {name}, {seconds:.0f} s at most", flush=True)
            sections[name] = run_apart(name, shape, folder, seconds)
            print(section(name, sections[name]), flush=True)
        write_json(folder / "results.json", sections)
        (folder / "summary.md").write_text(markdown(sections))
    print(summary(sections), flush=True)
    return int(any(errors(found) for found in sections.values()))


if __name__ == "__main__":
    sys.exit(tyro.cli(check, prog="python -m scripts.gpu", description=__doc__))
