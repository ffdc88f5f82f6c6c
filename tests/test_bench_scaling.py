"""Weak and strong scaling: which meshes are measured, what the figures mean, and that a mesh is measured at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import scaling as bench_scaling
from scripts.bench.options import Scaling


def test_the_figures_compare_with_one_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """With rates that are known: data splits without a loss, experts lose half with each doubling."""
    asked = []

    def rate(options: Scaling, mesh: str, rows: int) -> float:
        asked.append((mesh, rows))
        axis, devices = mesh.split("=")
        return 100.0 * (int(devices) if axis == "data" else 1)

    monkeypatch.setattr(bench_scaling, "rate", rate)
    monkeypatch.setenv("XLA_FLAGS", "")  # which the report changes
    bench_scaling.report(Scaling(batch=2, json=tmp_path / "figures.json"))
    found = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert len(found) == 16 and len(asked) == len(set(asked)) == 12, "nothing is measured twice"
    for case in found:
        assert case["rows"] == (16 if case["scaling"] == "strong" else 2 * case["devices"])
        data = case["mesh"].startswith("data")
        assert case["efficiency"] == pytest.approx(1 if data else 1 / case["devices"])
        assert case["relative_to_one"] == pytest.approx(case["devices"] if data else 1)
    printed = capsys.readouterr().out
    assert "cannot show a speed-up" in printed
    assert "| weak | expert=4 | 4 | 8 | 100.0 | 25.0 | 1.00 | 0.25 |" in printed


def test_a_mesh_is_measured() -> None:
    options = Scaling(prompt=8, new=4, repetitions=1)
    assert bench_scaling.rate(options, "expert=2", 4) > 0
