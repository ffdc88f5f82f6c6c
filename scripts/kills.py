"""Kill a run of the training loop at random moments until it is done; compare it with one that was never stopped.

    python -m scripts.kills --times 10

Each time a run of a small objective is started in a process of its own, killed (SIGKILL) at a random moment within the
time that it takes, and started again, once more killed or left to end. Its parameters must be those of the
uninterrupted run bit for bit, and its metrics.csv the same file. Linux only.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
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
LIMIT = 600
COMPARED = ("metrics.csv", *(f"model/{name}" for name in ("table", "experts", "norm.weight")))


def run(output: Path, seconds: float | None = None) -> int:
    """Run in a process of its own, killed `seconds` after its start if given: its status."""
    with subprocess.Popen([sys.executable, "-c", RUN, str(output)], env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
        try:
            process.communicate(timeout=seconds or LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait()


def main(times: int = 10, seed: int = 0) -> None:
    """Kill `times` runs, each once or twice."""
    draw, faults = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        whole, start = Path(name) / "whole", time.monotonic()
        if run(whole):
            sys.exit("the run does not end by itself")
        seconds = time.monotonic() - start
        for i in range(times):
            output, killed = Path(name) / str(i), []
            for _ in range(draw.randint(1, 2)):
                killed.append(draw.uniform(0.3 * seconds, seconds))
                run(output, killed[-1])
            status = run(output)
            same = not status and all((output / n).read_bytes() == (whole / n).read_bytes() for n in COMPARED)
            faults += not same
            print(
                f"killed after {', '.join(f'{s:.2f} s' for s in killed)}: {'same' if same else 'DIFFERENT'}", flush=True
            )
    print(f"{times - faults} of {times} ended as the run that was never stopped, of {seconds:.1f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m scripts.kills", description=__doc__)
