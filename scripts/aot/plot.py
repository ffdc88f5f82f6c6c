"""Draw what `report` found: the time that each program is expected to take, and its launches.

    python -m scripts.aot report --json found.json
    python -m scripts.aot plot found.json --out h200.png

The mark in a bar of time is the least that the program can take: reading once what it must read, at the speed of
memory. Programs whose products take longer than that have none. The mark beside a bar of launches is their goal.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scripts.aot.traffic import BANDWIDTH

# The most launches that a program may have, by how its name begins.
LAUNCHES = {"decode 1, 2048": 800, "decode 32, 4096": 1200, "prefill 1x8192": 4000, "speech frames 1": 1200,
            "speech frames 8": 1500}  # fmt: skip


def plot(files: Annotated[list[Path], tyro.conf.Positional], out: Path) -> int:
    """Draw the rows of some files to a PNG.

    Args:
        files: what `report --json` wrote.
        out: the picture.
    """
    drawn([row for file in files for row in json.loads(file.read_text())]).savefig(out, dpi=110)
    return 0


def drawn(rows: list[dict[str, Any]]) -> Any:
    """The figure of some rows of a report, from above; of programs that could not be compiled there is nothing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row["error"]][::-1]
    names, places = [row["program"] for row in rows], range(len(rows))
    figure, (time, launches) = plt.subplots(1, 2, figsize=(11, 1.2 + 0.34 * len(rows)), layout="constrained")
    bars = time.barh(places, [row["expected_ms"] for row in rows], color="#4878a8", label="expected, in a CUDA graph")
    time.bar_label(bars, [f"{row['expected_ms']:.3g}" for row in rows], padding=4, fontsize=8)
    marks(time, [(i, 1e12 * row["needed_gb"] / BANDWIDTH) for i, row in enumerate(rows) if row["needed_gb"]],
          "least, by what must be read")  # fmt: skip
    time.set(xscale="log", xlabel="ms", yticks=places, yticklabels=names)
    bars = launches.barh(places, [row["launches"] for row in rows], color="#8aa86a", label="launches")
    launches.bar_label(bars, label_type="center", color="white", fontsize=8)
    goals = [(i, goal) for i, name in enumerate(names) for begin, goal in LAUNCHES.items() if name.startswith(begin)]
    marks(launches, goals, "goal")
    launches.set(xlabel="launches", yticks=places, yticklabels=[])
    for axes in (time, launches):
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    return figure


def marks(axes: Any, found: Sequence[tuple[int, float]], label: str) -> None:
    """A short upright line at each (place, value)."""
    if found:
        places, values = zip(*found, strict=True)
        axes.plot(values, places, "|", color="black", markersize=11, markeredgewidth=2, label=label)
