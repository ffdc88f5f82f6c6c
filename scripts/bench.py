"""Measure the Thinker: prefill, first token, decode, compile time and peak memory, alone or beside transformers.

    python scripts/bench.py --shape medium --against hf

Every system runs in a process of its own, and where both fit, they are measured in turn: one repetition of ours, one of
theirs, so that whatever else the machine does falls on both. Both answer the same prompts greedily, through their
ordinary entry points. Weights are random; for tiny and medium both load the same checkpoint in the same type. For
"full" (the public 30B-A3B shape) each makes its own on the device: shapes and type are the same, values are not.

Figures: prefill is the time from a prepared batch to the first token on the host (time to first token, without media);
decode is tokens per second of all rows beyond the first. Medians over the repetitions after one warm-up, which is
reported apart as first call; compile time is the first call less the median.
"""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))


@dataclass(frozen=True)
class Bench:
    """Measure generation speed with random weights."""

    shape: Literal["tiny", "medium", "full"] = "tiny"
    against: Literal["hf"] | None = None
    """Measure transformers too."""
    prompt: int = 128
    """Prompt tokens per row."""
    new: int = 64
    """New tokens per row."""
    batch: int = 1
    repetitions: int = 5
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    """Threads of transformers on CPU; by default one per core."""
    json: Path | None = None
    """Write the figures here too."""


def ours(bench: Bench, directory: Path | None) -> tuple[Any, dict]:
    """Our model and a function that answers with a given number of new tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tiny_configs import config_dict

    from omni_jax.config import OmniConfig
    from omni_jax.decode.sampling import Sampling
    from omni_jax.decode.session import Session
    from omni_jax.inputs.batch import Batch
    from omni_jax.models.param import declare, init_params
    from omni_jax.models.thinker import Thinker

    if directory is None:
        config = OmniConfig.from_hf(config_dict(bench.shape))
        params = init_params(Thinker, config.thinker, dtype=jnp.dtype(bench.dtype))
    else:
        from convert import load_hf

        tree, config = load_hf(directory, parts=("thinker",), dtype=bench.dtype)
        params = tree["thinker"]
    graph = declare(Thinker, config.thinker)
    B, T = bench.batch, bench.prompt
    empty = np.full((B, T), -1, np.int32)
    batch = Batch(
        token_ids=_prompts(bench).astype(np.int32),
        mask=np.ones((B, T), bool),
        position_ids=np.broadcast_to(np.arange(T, dtype=np.float32), (3, B, T)),
        rope_delta=np.zeros(B, np.float32),
        vision=(),
        visual_index=empty,
        audio=None,
        audio_index=empty,
    )

    def answer(new: int) -> None:
        session = Session(params, graph, config.thinker.text, batch, Sampling(), new, 0, ())
        drawn = sum(len(ids) for step in session.chunks() for ids in step)
        assert drawn == B * new

    device = jax.devices()[0]
    return answer, {"jax": jax.__version__, "device": device.device_kind, "memory": device.memory_stats}


def theirs(bench: Bench, directory: Path | None) -> tuple[Any, dict]:
    """Their model and a function that answers with a given number of new tokens."""
    import torch
    import transformers
    from tiny_configs import config_dict
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeThinkerForConditionalGeneration

    torch.set_num_threads(bench.threads or os.cpu_count() or 1)
    model: Any
    dtype, device = getattr(torch, bench.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    if directory is None:
        thinker_config: Any = Qwen3OmniMoeConfig(**config_dict(bench.shape)).thinker_config
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = Qwen3OmniMoeThinkerForConditionalGeneration(thinker_config).eval()
    else:
        from transformers import Qwen3OmniMoeForConditionalGeneration

        whole: Any = Qwen3OmniMoeForConditionalGeneration.from_pretrained(directory, dtype=dtype)
        model = whole.thinker.to(device).eval()
    ids = torch.tensor(_prompts(bench), device=device)
    options = {"do_sample": False, "pad_token_id": 0}

    def answer(new: int) -> None:
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **options
        )
        assert out.shape[1] == bench.prompt + new
        if device == "cuda":
            torch.cuda.synchronize()

    def memory() -> dict | None:
        return {"peak_bytes_in_use": torch.cuda.max_memory_allocated()} if device == "cuda" else None

    return answer, {"transformers": transformers.__version__, "torch": torch.__version__, "memory": memory}


def _prompts(bench: Bench) -> Any:
    """Random ordinary tokens, int64 [B, T]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 200, (bench.batch, bench.prompt))


def work(system: str, bench: Bench, directory: Path | None, pipe: Connection) -> None:
    """A process of one system: for every message, time one prompt alone and one with its reply, and send both."""
    if system == "ours":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    start = time.perf_counter()
    answer, about = (ours if system == "ours" else theirs)(bench, directory)
    memory = about.pop("memory")
    pipe.send({"load_seconds": time.perf_counter() - start, **about})
    while pipe.recv():
        times = []
        for new in (1, bench.new):
            start = time.perf_counter()
            answer(new)
            times.append(time.perf_counter() - start)
        device = memory()
        peak = device["peak_bytes_in_use"] if device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send({"first": times[0], "whole": times[1], "peak_bytes": peak})


class Worker:
    """The parent's end of a measured process."""

    def __init__(self, system: str, bench: Bench, directory: Path | None):
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=work, args=(system, bench, directory, child), daemon=True)
        self.process.start()
        child.close()
        self.about = self.pipe.recv()
        self.samples: list[dict] = []

    def measure(self) -> None:
        """One repetition."""
        self.pipe.send(True)
        self.samples.append(self.pipe.recv())

    def stop(self) -> None:
        """Let the process end, and its memory go."""
        self.pipe.send(False)
        self.process.join()

    def figures(self, bench: Bench) -> dict:
        """Medians of all repetitions but the first."""
        first, *rest = self.samples
        prefill = statistics.median(s["first"] for s in rest)
        decode = statistics.median(s["whole"] - s["first"] for s in rest)
        whole = statistics.median(s["first"] + s["whole"] for s in rest)
        return {
            "prefill_tokens_per_second": bench.batch * bench.prompt / prefill,
            "time_to_first_token": prefill,
            "decode_tokens_per_second": bench.batch * (bench.new - 1) / decode,
            "compile_seconds": max(0.0, first["first"] + first["whole"] - whole),
            "peak_bytes": rest[-1]["peak_bytes"],
            **self.about,
        }


def run(bench: Bench) -> dict[str, dict]:
    """Figures by system, measured in turn where both fit the machine."""
    systems = ["ours", "hf"] if bench.against else ["ours"]
    with tempfile.TemporaryDirectory() as folder:
        directory = None
        if bench.shape != "full":
            from make_tiny_checkpoint import make_checkpoint

            directory = make_checkpoint(Path(folder) / bench.shape, bench.shape)
        figures = {}
        for group in [systems] if directory else [[s] for s in systems]:
            workers = {system: Worker(system, bench, directory) for system in group}
            for _ in range(1 + bench.repetitions):
                for worker in workers.values():
                    worker.measure()
            for system, worker in workers.items():
                figures[system] = worker.figures(bench)
                worker.stop()
    return figures


def table(bench: Bench, figures: dict[str, dict]) -> str:
    """The figures for people."""
    rows = (
        ("prefill, tokens/s", "prefill_tokens_per_second", 1.0),
        ("time to first token, ms", "time_to_first_token", 1e3),
        ("decode, tokens/s", "decode_tokens_per_second", 1.0),
        ("compile, s", "compile_seconds", 1.0),
        ("peak memory, MB", "peak_bytes", 1e-6),
    )
    lines = [f"{bench.shape}, {bench.dtype}, batch {bench.batch}, prompt {bench.prompt}, new {bench.new}"]
    lines.append(
        f"{'':<26}" + "".join(f"{system:>12}" for system in figures) + ("   ours / hf" if "hf" in figures else "")
    )
    for label, key, scale in rows:
        values = [f[key] * scale for f in figures.values()]
        ratio = f"{values[0] / values[1]:>12.2f}" if len(values) == 2 else ""
        lines.append(f"{label:<26}" + "".join(f"{value:>12.1f}" for value in values) + ratio)
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for and print it."""
    import tyro  # here, because gpu_check.py uses the rest where only jax and flax are installed

    bench = tyro.cli(Bench, description=__doc__)
    figures = run(bench)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for system, f in figures.items():
        print(f"{system}: " + ", ".join(f"{k} {f[k]}" for k in ("device", "jax", "transformers", "torch") if k in f))
    print(table(bench, figures))
    if bench.json:
        bench.json.write_text(json.dumps({"bench": {**asdict(bench), "json": None}, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
