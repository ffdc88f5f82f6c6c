"""Measure decoding on meshes of one, two, four, ... devices: what is left of each one's speed when there are more.

    python -m scripts.bench --scaling                  # eight virtual CPU devices, or the GPUs that are there
    python -m scripts.bench --scaling --shape full --dtype bfloat16 --batch 8

Two ways to lay a model out, rows of a batch over devices (data=n) and experts and rows over devices (expert=n), each
measured twice: strong scaling keeps the rows of all devices together, `--batch` times the most devices; weak scaling
keeps `--batch` rows on each device. Efficiency is the rate over that of one device and their number.

Virtual CPU devices share the cores of one machine. They cannot show a speed-up, however good the program: if nothing
were lost, a fixed batch would give the same tokens a second on any number of them. What is missing is overhead.
"""

import json
import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from scripts.bench.text import prompts, text_batch
from scripts.bench.worker import Bench, require

VIRTUAL_DEVICES = 8
TITLES = ("scaling", "mesh", "devices", "rows", "tokens/s", "tokens/s a device", "of one device", "efficiency")


@dataclass(frozen=True)
class Case:
    """A mesh and the rows that it decodes."""

    scaling: str
    axis: str
    devices: int
    rows: int

    @property
    def mesh(self) -> str:
        return f"{self.axis}={self.devices}"


def report(bench: Bench) -> None:
    """Measure all meshes, print the table, and write the JSON where asked for."""
    # Read when the first device is asked for; for CPU only.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={VIRTUAL_DEVICES}"
    )
    import jax

    first = jax.devices()[0]
    found = run(bench)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {jax.__version__}")
    print(f"{first.device_kind}; {bench.shape}, {bench.dtype}, prompt {bench.prompt}, new {bench.new}, decoding alone")
    if first.platform == "cpu":
        print(
            f"{len(jax.devices())} virtual devices share {os.cpu_count()} cores: this shows what splitting costs, and "
            "can show no speed-up"
        )
    print(table(found))
    if bench.json:
        bench.json.write_text(json.dumps({"bench": {**asdict(bench), "json": None}, "figures": found}, indent=1))


def run(bench: Bench) -> list[dict[str, Any]]:
    """The figures of every case, in the order of the table."""
    import jax

    rates: dict[tuple[str, int], float] = {}
    found = []
    for case in cases(bench.batch, len(jax.devices())):
        # One device is one device, whatever its axis is called.
        mesh = "data=1" if case.devices == 1 else case.mesh
        if (mesh, case.rows) not in rates:
            rates[mesh, case.rows] = rate(bench, mesh, case.rows)
        found.append({**asdict(case), "mesh": case.mesh, "tokens_per_second": rates[mesh, case.rows]})
    return [{**told, **compared(told, found)} for told in found]


def cases(batch: int, devices: int) -> Iterator[Case]:
    """All meshes of one, two, four, ... of so many devices, fixed rows first."""
    counts = [1 << i for i in range(devices.bit_length())]
    for scaling in ("strong", "weak"):
        for axis in ("data", "expert"):
            for n in counts:
                yield Case(scaling, axis, n, batch * (counts[-1] if scaling == "strong" else n))


def compared(told: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, float]:
    """A case beside the same on one device."""
    same = (other for other in found if all(other[key] == told[key] for key in ("scaling", "axis")))
    ratio = told["tokens_per_second"] / next(other for other in same if other["devices"] == 1)["tokens_per_second"]
    return {"of_one_device": ratio, "efficiency": ratio / told["devices"]}


def rate(bench: Bench, mesh_name: str, rows: int) -> float:
    """Tokens a second of `rows` rows on a mesh: the median of all repetitions but the first, which compiles."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from omni_jax.config import OmniConfig
    from omni_jax.decode.sampling import Sampling
    from omni_jax.decode.session import Session
    from omni_jax.models.param import declare, init_params
    from omni_jax.models.thinker import Thinker
    from omni_jax.sharding import check_mesh, make_mesh, shardings
    from omni_jax.weights.mesh_text import parse_mesh
    from scripts.small.configs import config_dict

    sizes, config = parse_mesh(mesh_name), OmniConfig.from_hf(config_dict(bench.shape)).thinker
    mesh = make_mesh(None, **sizes)
    declaration = declare(Thinker, config, mesh=mesh)
    check_mesh({"thinker": (declaration.shapes, declaration.axes)}, mesh)
    make = partial(init_params, Thinker, config, dtype=jnp.dtype(bench.dtype))
    params = jax.jit(make, out_shardings=shardings(declaration.axes, mesh))()
    ids = np.resize(prompts(bench).astype(np.int32), (rows, bench.prompt))
    seconds = []
    for _ in range(1 + bench.repetitions):
        session = Session(params, declaration, config.text, text_batch(ids), Sampling(), bench.new, 0, ())
        drawn = sum(len(row) for step in session.chunks() for row in step)
        require("new tokens", drawn, rows * bench.new)
        seconds.append(session.decode_seconds)
    return rows * (bench.new - 1) / statistics.median(seconds[1:])


def table(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    for told in found:
        speed = told["tokens_per_second"]
        lines.append(
            f"| {told['scaling']} | {told['mesh']} | {told['devices']} | {told['rows']} | {speed:.1f} "
            f"| {speed / told['devices']:.1f} | {told['of_one_device']:.2f} | {told['efficiency']:.2f} |"
        )
    return "\n".join(lines)
