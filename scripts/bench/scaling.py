"""Measure decoding on meshes of 1, 2, 4, ... devices: how much of each device's speed remains as there are more.

    python -m scripts.bench scaling                  # on eight virtual CPU devices, or all GPUs
    python -m scripts.bench scaling --shape full --dtype bfloat16 --batch 8

A model is laid out in two ways, with rows of a batch over devices (data=n) and with experts and rows over devices
(expert=n). Each is measured twice: strong scaling has a fixed number of rows, `--batch` times the most devices; weak
scaling has `--batch` rows per device. Efficiency is the speed relative to one device, divided by the number of devices.

Virtual CPU devices share the cores of one machine, so they cannot show a speed-up, however good the program: without
any loss, a fixed batch would give the same tokens per second on any number of them. What is missing is overhead.
"""

import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from omni_jax.inputs.batch import Batch
from scripts.bench.compare import write_json
from scripts.bench.options import Scaling
from scripts.bench.system import prompts

VIRTUAL_DEVICES = 8
TITLES = ("scaling", "mesh", "devices", "rows", "tokens/s", "tokens/s per device", "relative to one", "efficiency")


@dataclass(frozen=True)
class Case:
    """A mesh, and the number of rows that it decodes."""

    scaling: str
    axis: str
    devices: int
    rows: int

    @property
    def mesh(self) -> str:
        return f"{self.axis}={self.devices}"


def report(options: Scaling) -> None:
    """Measure all meshes, print the table, and write the JSON if asked for."""
    # Read when the first device is looked up; for CPU only.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={VIRTUAL_DEVICES}"
    )
    import jax

    first = jax.devices()[0]
    found = run(options)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}")
    sizes = f"{options.shape}, {options.dtype}, prompt {options.prompt}, new {options.new}"
    print(f"{first.device_kind}; {sizes}, decoding without prefill")
    if first.platform == "cpu":
        print(
            f"{len(jax.devices())} virtual devices share {os.cpu_count()} cores: this shows what splitting costs, and "
            "cannot show a speed-up"
        )
    print(table(found))
    write_json(options.json, options, found)


def run(options: Scaling) -> list[dict[str, Any]]:
    """The figures of every case, in the order of the table."""
    import jax

    rates: dict[tuple[str, int], float] = {}
    found = []
    for case in cases(options.batch, len(jax.devices())):
        # On one device the axis makes no difference.
        mesh = "data=1" if case.devices == 1 else case.mesh
        if (mesh, case.rows) not in rates:
            rates[mesh, case.rows] = rate(options, mesh, case.rows)
        found.append({**asdict(case), "mesh": case.mesh, "tokens_per_second": rates[mesh, case.rows]})
    return [{**case, **compared(case, found)} for case in found]


def cases(batch: int, devices: int) -> Iterator[Case]:
    """All meshes of 1, 2, 4, ... up to the number of devices, those with a fixed number of rows first."""
    counts = [1 << i for i in range(devices.bit_length())]
    for scaling in ("strong", "weak"):
        for axis in ("data", "expert"):
            for n in counts:
                yield Case(scaling, axis, n, batch * (counts[-1] if scaling == "strong" else n))


def compared(case: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, float]:
    """A case's speed relative to the same case on one device."""
    same = (other for other in found if all(other[key] == case[key] for key in ("scaling", "axis")))
    ratio = case["tokens_per_second"] / next(other for other in same if other["devices"] == 1)["tokens_per_second"]
    return {"relative_to_one": ratio, "efficiency": ratio / case["devices"]}


def rate(options: Scaling, mesh_name: str, rows: int) -> float:
    """Tokens per second of `rows` rows on a mesh: the median of all repetitions but the first, which compiles."""
    from scripts.bench.thinker import laid_out_thinker

    model = laid_out_thinker(options.shape, options.dtype, mesh_name)
    batch = Batch.of_text(np.resize(prompts(options.batch, options.prompt), (rows, options.prompt)))
    seconds = [model.decode(batch, options.new).decode_seconds for _ in range(1 + options.repetitions)]
    return rows * (options.new - 1) / statistics.median(seconds[1:])


def table(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    for case in found:
        speed = case["tokens_per_second"]
        lines.append(
            f"| {case['scaling']} | {case['mesh']} | {case['devices']} | {case['rows']} | {speed:.1f} "
            f"| {speed / case['devices']:.1f} | {case['relative_to_one']:.2f} | {case['efficiency']:.2f} |"
        )
    return "\n".join(lines)
