"""A measured system: what runs one repetition, and the checks without which its figures would be wrong."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class System:
    """A loaded model.

    repeat: runs one repetition and returns the seconds of its parts by name.
    memory: the device's statistics, with `peak_bytes_in_use`, or None where only the process knows.
    about: versions and device.
    """

    repeat: Callable[[], dict[str, float]]
    memory: Callable[[], dict | None]
    about: dict[str, str]


def our_system(repeat: Callable[[], dict[str, float]]) -> System:
    """This project, on JAX's first device."""
    import jax

    device = jax.devices()[0]
    return System(repeat, device.memory_stats, {"jax": jax.__version__, "device": device.device_kind})


def their_device(threads: int | None) -> str:
    """The device of transformers, "cuda" or "cpu"; sets the number of threads that it may use."""
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    return "cuda" if torch.cuda.is_available() else "cpu"


def their_system(repeat: Callable[[], dict[str, float]], device: str) -> System:
    """Transformers, on `device`."""
    import torch
    import transformers

    def memory() -> dict | None:
        return {"peak_bytes_in_use": torch.cuda.max_memory_allocated()} if device == "cuda" else None

    return System(repeat, memory, {"transformers": transformers.__version__, "torch": torch.__version__})


def timed(run: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds that `run` takes, until torch's `device` has finished it too, and its result."""
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def require(what: str, got: Any, expected: Any) -> None:
    """Raise RuntimeError unless a run produced what was asked for: the figures would be of something else."""
    if got != expected:
        raise RuntimeError(f"{what}: {got} produced, {expected} expected; the figures would be wrong")


def prompts(rows: int, tokens: int) -> np.ndarray:
    """Random ordinary tokens, int64 [rows, tokens]."""
    return np.random.default_rng(0).integers(0, 200, (rows, tokens))
