"""What `bench.py` measures is settled here, and one system at a time is measured, each in a process of its own.

A kind of measurement is a module (`bench_text`, `bench_speech`, `bench_speculative`) with `ours` and `theirs`, which
build a `System`; `figures`, which turns the median seconds of a repetition's parts into figures; `ROWS`, the table's
lines; and `title`.
"""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal


@dataclass(frozen=True)
class Bench:
    """Measure generation speed with random weights."""

    shape: Literal["tiny", "medium", "large", "full"] = "tiny"
    against: Literal["hf"] | None = None
    """Measure transformers too."""
    speech: bool = False
    """Measure spoken replies instead of text."""
    speculative: bool = False
    """Measure drafting: with an oracle's drafts, or with drafters on prompts."""
    load: bool = False
    """Measure what a host holds while it loads a checkpoint onto a mesh; --shape large has 2.3 GB."""
    scaling: bool = False
    """Measure a fixed batch on meshes of more and more devices, and one that grows with them (--batch rows on each)."""
    drafter: tuple[str, ...] = ()
    """With --speculative: a drafter's directory, or oracle:0.3; repeat the flag to compare."""
    model: Path | None = None
    """With --drafter: the checkpoint that it was made for, converted or in Hugging Face format."""
    prompts: Path | None = None
    """With --drafter: a JSONL file of prompts, such as MT-Bench's questions."""
    count: int = 80
    """With --drafter: how many of the prompts."""
    plot: Path | None = None
    """With --drafter: draw how often drafts stood, by position, to this PNG."""
    prompt: int = 128
    """Prompt tokens per row."""
    new: int = 64
    """New tokens per row."""
    frames: int = 64
    """Frames of speech per row, 80 ms each in the public model."""
    greedy: bool = False
    """Draw the codes of speech greedily; text always is."""
    batch: int = 1
    repetitions: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    """Threads of transformers on CPU; by default one per core."""
    json: Path | None = None
    """Write the figures here too."""

    def __post_init__(self) -> None:
        least = {"prompt": 8, "new": 2, "frames": 2, "batch": 1, "count": 1, "repetitions": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {minimum}")
        if sum((self.speech, self.speculative, self.load, self.scaling)) > 1:
            raise ValueError("measure one of speech, drafting, loading and scaling")
        if (self.load or self.scaling) and self.against:
            raise ValueError("loading and scaling are measured of ours alone")
        if self.load and self.shape == "full":
            raise ValueError("loading is measured of a shape that can be written: choose large")
        if self.drafter and not (self.speculative and self.model and self.prompts):
            raise ValueError("--drafter needs --speculative, --model and --prompts")


@dataclass(frozen=True)
class System:
    """A loaded model: what runs one repetition and returns the seconds of its parts, and what is known about it.

    memory: the device's statistics, with `peak_bytes_in_use`, or None where only the process knows.
    """

    repeat: Callable[[], dict[str, float]]
    memory: Callable[[], dict | None]
    about: dict[str, str]


def kind(bench: Bench) -> ModuleType:
    """The module that measures what is asked for."""
    if bench.speculative:
        return import_module("scripts.bench.drafting")
    return import_module("scripts.bench.speech" if bench.speech else "scripts.bench.text")


def our_system(repeat: Callable[[], dict[str, float]]) -> System:
    """Ours, on JAX's first device."""
    import jax

    device = jax.devices()[0]
    return System(repeat, device.memory_stats, {"jax": jax.__version__, "device": device.device_kind})


def their_device(bench: Bench) -> str:
    """Where transformers runs; sets the threads that it may use."""
    import torch

    torch.set_num_threads(bench.threads or os.cpu_count() or 1)
    return "cuda" if torch.cuda.is_available() else "cpu"


def their_system(repeat: Callable[[], dict[str, float]], device: str) -> System:
    """Theirs, on `device`."""
    import torch
    import transformers

    def memory() -> dict | None:
        return {"peak_bytes_in_use": torch.cuda.max_memory_allocated()} if device == "cuda" else None

    return System(repeat, memory, {"transformers": transformers.__version__, "torch": torch.__version__})


def timed(run: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds that `run` takes, until torch's `device` has done it too, and what it returns."""
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def require(what: str, made: Any, asked: Any) -> None:
    """Raise RuntimeError unless as much was made as asked for: the figures would be of something else."""
    if made != asked:
        raise RuntimeError(f"{what}: {made} made, {asked} asked for; the figures would be wrong")


def work(name: str, bench: Bench, directory: Path | None, pipe: Connection) -> None:
    """A process of one system: load it, then run a repetition for every message and send what it took."""
    if name == "ours":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    measured = kind(bench)
    seconds, system = timed(lambda: (measured.ours if name == "ours" else measured.theirs)(bench, directory))
    pipe.send({"load_seconds": seconds, **system.about})
    while pipe.recv():
        seconds, parts = timed(system.repeat)
        device = system.memory()
        peak = device["peak_bytes_in_use"] if device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send({"repetition": seconds, "peak_bytes": peak, **parts})


class Worker:
    """The parent's end of a measured process."""

    def __init__(self, name: str, bench: Bench, directory: Path | None):
        context = multiprocessing.get_context("spawn")
        self.name, self.bench = name, bench
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=work, args=(name, bench, directory, child), daemon=True)
        self.process.start()
        child.close()
        self.about = self._receive()
        self.samples: list[dict] = []

    def _receive(self) -> dict:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"the process that measures {self.name!r} failed; its error stands above") from None

    def measure(self) -> None:
        """One repetition."""
        self.pipe.send(True)
        self.samples.append(self._receive())

    def stop(self) -> None:
        """Let the process end, and its memory go."""
        self.pipe.send(False)
        self.process.join()

    def figures(self) -> dict:
        """Figures from the medians of all repetitions but the first."""
        first, *rest = self.samples
        medians = {part: statistics.median(sample[part] for sample in rest) for part in first}
        return {
            **kind(self.bench).figures(self.bench, medians),
            "compile_seconds": max(0.0, first["repetition"] - medians["repetition"]),
            "peak_bytes": rest[-1]["peak_bytes"],
            **self.about,
        }
