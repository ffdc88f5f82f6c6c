"""Experts by a plain loop over rows, and what a compiled program sends between devices."""

import re
from typing import Any

import numpy as np

from omni_jax.ops.int8 import Int8
from scripts.gpu import correct


def plain(
    x: np.ndarray, ids: np.ndarray, scale: np.ndarray, gate_up: np.ndarray, down: np.ndarray, l: int
) -> np.ndarray:
    out = np.zeros_like(x, dtype=np.float64)
    for r in range(x.shape[0]):
        for e, s in zip(ids[r], scale[r], strict=True):
            gate, up = x[r].astype(np.float64) @ gate_up[l, e, :, 0], x[r].astype(np.float64) @ gate_up[l, e, :, 1]
            out[r] += s * ((gate / (1 + np.exp(-gate)) * up) @ down[l, e])
    return out


def in_int8(gate_up: np.ndarray, down: np.ndarray) -> tuple[Int8, Int8, np.ndarray, np.ndarray]:
    """Experts gate_up [L, E, D, 2, F] and down [L, E, F, D] in eight bits, and what these are as float32."""

    def one(weight: np.ndarray) -> tuple[Int8, np.ndarray]:
        own = correct.in_int8(weight, "float32")
        return own, np.asarray(own.values) * np.asarray(own.scale)[..., None]

    gate_up8, wide_gate_up = one(np.moveaxis(gate_up, 2, -1))
    down8, wide_down = one(down.swapaxes(2, 3))
    return gate_up8, down8, np.moveaxis(wide_gate_up, -1, 2), wide_down.swapaxes(2, 3)


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
