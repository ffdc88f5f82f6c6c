"""Kill a run of the training loop at random moments until it is done; compare it with one that was never stopped.

    python -m scripts.kills --times 10

Each time a run of a small objective is started in a process of its own, killed (SIGKILL) at a random moment within the
time that it takes, and started again, once more killed or left to end. Its parameters must be those of the
uninterrupted run bit for bit, and its metrics.csv the same file. Linux only.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from scripts.small.quick import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent
# Each process compiles, so that all take as long as the first.
ENVIRONMENT = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS, "PYTHONPATH": str(ROOT),
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}  # fmt: skip
# A run with a checkpoint every few steps, which says when it begins to take them and waits a little at each.
RUN = """
import sys, time
from pathlib import Path
from omni_jax.train.loop import train
from scripts.small.objective import ToyBatches, make_objective, recipe_for
class Slow(ToyBatches):
    def step(self, number):
        if number == 0:
            print("under way", flush=True)
        time.sleep(0.02)
        return super().step(number)
train(recipe_for(Path(sys.argv[1]), steps=40, save_every=3, log_every=4), make_objective(), Slow())
"""
# Seconds after which a run that has not ended is a fault.
LIMIT = 3600
COMPARED = ("metrics.csv", *(f"model/{name}" for name in ("table", "experts", "norm.weight")))


def run(output: Path, seconds: float | None = None) -> str:
    """Run in a process of its own, killed `seconds` after its start if given: what was wrong with its end, or ""."""
    command = [sys.executable, "-c", RUN, str(output)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, said = process.communicate(timeout=seconds or LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
        if seconds is None and process.returncode == -signal.SIGKILL:
            return f"it did not end by itself within {LIMIT} s"
        ended = process.returncode == 0 or (seconds is not None and process.returncode == -signal.SIGKILL)
        return "" if ended else f"status {process.returncode}: {said[-2000:]}"


def differences(output: Path, whole: Path) -> str:
    """The files that differ from those of the run that was not stopped, "" if none does."""
    names = [name for name in COMPARED if (output / name).read_bytes() != (whole / name).read_bytes()]
    return f"{', '.join(names)} differ:\n{(output / COMPARED[0]).read_text()}" if names else ""


def main(times: int = 10, seed: int = 0) -> None:
    """Kill `times` runs, each once or twice."""
    draw, faults = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        whole, start = Path(name) / "whole", time.monotonic()
        if wrong := run(whole):
            sys.exit(f"the run does not end by itself: {wrong}")
        seconds = time.monotonic() - start
        for i in range(times):
            output = Path(name) / str(i)
            moments = [draw.uniform(0.3 * seconds, seconds) for _ in range(draw.randint(1, 2))]
            wrong = next(filter(None, (run(output, moment) for moment in (*moments, None))), "")
            wrong = wrong or differences(output, whole)
            faults += bool(wrong)
            print(f"killed after {', '.join(f'{s:.2f} s' for s in moments)}: {wrong or 'same'}", flush=True)
    print(f"{times - faults} of {times} ended as the run that was never stopped, of {seconds:.1f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m scripts.kills", description=__doc__)
