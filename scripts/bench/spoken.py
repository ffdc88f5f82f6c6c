"""Measure evaluation with speech: replies in slots beside one at a time.

    python -m scripts.bench spoken --model ckpt

The task speech of `omni-jax evaluate` runs on the same prompts with both numbers of slots in turn, on a model that is
loaded once. The first round compiles and is not counted. Seconds are those of the whole command without loading; the
seconds of the processors depend less on what else the machine does. Results must be equal: texts, tokens, sound and
scores.
"""

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import numpy as np

import omni_jax
from omni_jax.evaluate.command import Evaluate, SpeechFlags, evaluate
from omni_jax.evaluate.stored import read_all
from omni_jax.flags import EndingFlags
from omni_jax.omni import Omni
from scripts.bench.compare import write_json
from scripts.bench.options import Spoken
from scripts.bench.system import require


@dataclass
class Way:
    """One number of slots, and what each counted round took; results: of the last round, without their times."""

    slots: int
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    real_time_factor: list[float] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Medians by name."""
        names = ("seconds", "processor_seconds", "real_time_factor")
        return {name: median(getattr(self, name)) for name in names}


def hear(wave: np.ndarray, rate: int) -> str:
    """A recogniser that takes no time; what it returns depends on every sample of the wave, float32 [n]."""
    return str(crc32(wave.tobytes()))


def report(options: Spoken) -> None:
    """Measure, print the table, and write the JSON if asked for."""
    ways = measure(options, omni_jax.load(options.model))
    one, many = (way.figures() for way in ways)
    sizes = f"{options.count} prompts, {options.new} new tokens, {options.frames} frames"
    print(f"{sizes}, medians of {options.repetitions}: one at a time, {options.slots} slots, ratio")
    for name, value in one.items():
        print(f"{name:18} {value:9.3f} {many[name]:9.3f} {value / many[name]:7.2f}")
    write_json(options.json, options, {"one": one, "slots": many, "ratio": one["seconds"] / many["seconds"]})


def measure(options: Spoken, omni: Omni) -> list[Way]:
    """One at a time and the options' slots, in turn; the first round is not counted."""
    ways = [Way(1), Way(options.slots)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        rows = ({"prompt": f"Say number {i} {'and more ' * (i % 4)}"} for i in range(options.count))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for repetition in range(1 + options.repetitions):
            for way in ways:
                _run(options, omni, way, data, Path(folder) / f"{repetition}-{way.slots}", repetition > 0)
            require("results", ways[1].results, ways[0].results)
    return ways


def _run(options: Spoken, omni: Omni, way: Way, data: Path, output: Path, counted: bool) -> None:
    command = Evaluate(
        model=options.model,
        data=data,
        output=output,
        task="speech",
        slots=way.slots,
        reply=EndingFlags(max_new_tokens=options.new),
        speech=SpeechFlags(max_frames=options.frames, recogniser=f"{__name__}:hear"),
    )
    start, processor = time.perf_counter(), time.process_time()
    summary = evaluate(command, lambda parts: omni)
    if counted:
        way.seconds.append(time.perf_counter() - start)
        way.processor_seconds.append(time.process_time() - processor)
        way.real_time_factor.append(summary["speech"]["real_time_factor"])
    require("samples that failed", summary["failed"], 0)
    way.results = {result["id"]: _made(result) for result in read_all(output)}


def _made(result: dict[str, Any]) -> tuple:
    (turn,) = result["turns"]
    return turn["text"], turn["token_ids"], turn["stats"]["frames"], result["heard"], result["scores"]
