"""Experts by a plain loop over rows, and what a compiled program sends between devices."""

import re
from typing import Any

import numpy as np


def plain(
    x: np.ndarray, ids: np.ndarray, scale: np.ndarray, gate_up: np.ndarray, down: np.ndarray, l: int
) -> np.ndarray:
    out = np.zeros_like(x, dtype=np.float64)
    for r in range(x.shape[0]):
        for e, s in zip(ids[r], scale[r], strict=True):
            gate, up = x[r].astype(np.float64) @ gate_up[l, e, :, 0], x[r].astype(np.float64) @ gate_up[l, e, :, 1]
            out[r] += s * ((gate / (1 + np.exp(-gate)) * up) @ down[l, e])
    return out


def collectives(compiled: Any) -> dict[str, int]:
    """The elements of the largest result of each kind of collective in a compiled program."""
    found: dict[str, int] = {}
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text()):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        found[kind] = max(found.get(kind, 0), *sizes)
    return found
