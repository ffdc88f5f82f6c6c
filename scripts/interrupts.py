"""Interrupt each command at random moments, imports included; require one line, status 130 and no partial files.

    python -m scripts.interrupts --times 30

Each command runs once to its end, which gives its duration; then new processes are interrupted at random moments within
that duration, counted from the first module of the project: before that, for 30 ms, Python itself handles interrupts.
Results written by an interrupted evaluation must be complete lines, and the same command must complete them. Linux
only.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from scripts.small.quick import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent
# Each process compiles, so that all take as long as the first.
ENVIRONMENT = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS, "PYTHONPATH": str(ROOT),
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}  # fmt: skip
NOISE = ("Traceback", "Exception ignored", "Fatal Python", "Segmentation", "Error")
SAMPLES = 6
# Seconds after which a process that has not ended is killed.
LIMIT = 300


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status, what it wrote to stderr, and its duration."""

    status: int
    err: str
    seconds: float


@dataclass(frozen=True)
class Command:
    """A command. arguments: of Python, for a folder of its files; left: what it wrongly left there, None if nothing."""

    name: str
    arguments: Callable[[Path], list[str]]
    left: Callable[[Path], str | None]


def run(arguments: list[str], seconds: float | None = None, again: float | None = None) -> Ended:
    """Run Python, interrupt it after `seconds` if given, and `again` seconds later."""
    # Background jobs of a shell ignore interrupts, and their child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, start_new_session=True, **pipes) as process:
        try:
            # The second thread is the one that handles interrupts.
            while process.poll() is None and _threads(process) < 2:
                time.sleep(0.001)
            start = time.monotonic()
            for wait in (seconds, again):
                if wait is not None:
                    time.sleep(wait)
                    process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=LIMIT)
            return Ended(process.returncode, err, time.monotonic() - start)
        finally:
            process.kill()


def _threads(process: subprocess.Popen) -> int:
    """The number of threads of a process; 0 if it has just ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return len(os.listdir(f"/proc/{process.pid}/task"))
    return 0


def fault(ended: Ended) -> str | None:
    """What is wrong with the end of an interrupted process, None if nothing is."""
    lines = [line for line in ended.err.splitlines() if "interrupted" in line]
    if ended.status != 130:
        return f"status {ended.status}"
    if len(lines) != 1 or not ended.err.strip().splitlines()[-1].endswith(lines[0]):
        return f"{len(lines)} lines, the last is not the only one"
    return next((f"{noise!r} in stderr" for noise in NOISE if noise in ended.err), None)


def commands(hf: Path, model: Path, data: Path) -> list[Command]:
    """All commands that run long, for a small checkpoint, its conversion, and a dataset of `SAMPLES` rows."""
    ask = ["--model", str(model), "--text", "Say something", "--max-new-tokens", "12"]
    speak = ["--max-frames", "4", "--speak"]
    score = ["--model", str(model), "--data", str(data), "--slots", "2", "--max-new-tokens", "16", "--output"]
    omni = ["-m", "omni_jax"]
    return [
        Command("generate", lambda at: [*omni, "generate", *ask, *speak, str(at / "said.wav")], _hidden),
        Command("stream", lambda at: [*omni, "stream", *ask], _hidden),
        Command("evaluate", lambda at: [*omni, "evaluate", *score, str(at / "results")], _results),
        Command("convert", lambda at: ["-m", "convert", str(hf), str(at / "made")], _hidden),
    ]


def _hidden(at: Path) -> str | None:
    """Files with hidden names, and a sound or checkpoint that is incomplete."""
    hidden = [path.name for path in at.rglob(".*")]
    if not hidden and (at / "made").exists() and not (at / "made" / "manifest.json").is_file():
        hidden = ["made"]
    return f"left behind: {hidden}" if hidden else None


def _results(at: Path) -> str | None:
    """As `_hidden`; raises an error for a line of the results that is cut off."""
    for file in at.rglob("results-*.jsonl"):
        for line in file.read_bytes().splitlines():
            json.loads(line)
    return _hidden(at)


def _complete(command: Command, at: Path) -> str | None:
    """Run a command again to its end, where an earlier one was interrupted."""
    ended = run(command.arguments(at))
    if ended.status != 0:
        return f"status {ended.status} of the same command again: {ended.err[-500:]}"
    found = [json.loads(line)["id"] for file in at.rglob("results-*.jsonl") for line in file.read_text().splitlines()]
    return None if command.name != "evaluate" or len(set(found)) == len(found) == SAMPLES else f"results of {found}"


def try_command(command: Command, times: int, draw: random.Random, folder: Path) -> list[str]:
    """Interrupt a command `times` times; returns descriptions of what was wrong, with the moments."""
    whole = run(command.arguments(_folder(folder, "whole")))
    if whole.status != 0:
        return [f"{command.name} does not run: {whole.err[-1000:]}"]
    faults, seconds, done = [], [], 0
    while done < times:
        moment, at = draw.uniform(0, whole.seconds), _folder(folder, str(len(seconds)))
        ended = run(command.arguments(at), moment)
        seconds.append(ended.seconds - moment)
        if ended.status == 0:
            continue  # It ended before the interrupt came.
        done += 1
        wrong = fault(ended) or command.left(at) or (_complete(command, at) if done % 10 == 0 else None)
        if wrong:
            faults.append(f"{command.name} after {moment:.3f} s: {wrong}\n{ended.err[-2000:]}")
    print(f"{command.name}: {times - len(faults)} of {times} ended well, of {whole.seconds:.1f} s, ", end="")
    print(f"the slowest {max(seconds):.2f} s after the interrupt; {len(seconds) - done} had ended before", flush=True)
    return faults


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir(parents=True)
    return parent / name


def main(times: int = 30, seed: int = 0, only: str | None = None) -> None:
    """Interrupt all commands, or the one that `only` names."""
    from scripts.small.checkpoint import make_checkpoint

    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf, model, data = make_checkpoint(folder / "hf", "tiny"), folder / "model", folder / "data.jsonl"
        rows = [{"id": f"q{i}", "prompt": "word " * (i + 1), "reference": "x"} for i in range(SAMPLES)]
        data.write_text("\n".join(map(json.dumps, rows)))
        made = run(["-m", "convert", str(hf), str(model)])
        faults = [] if made.status == 0 else [made.err]
        for command in commands(hf, model, data):
            if not faults and only in (None, command.name):
                faults += try_command(command, times, draw, folder / command.name)
    print("\n".join(faults), file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m scripts.interrupts", description=__doc__)
