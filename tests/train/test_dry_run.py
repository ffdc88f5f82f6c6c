"""What a dry run says of a small objective: counts, and bytes on each device."""

from pathlib import Path

import jax
import pytest

from omni_jax.sharding import make_mesh
from omni_jax.train.dry_run import dry_run, memory
from scripts.small.objective import ToyBatches, make_objective, recipe_for

TABLE, EXPERTS, NORM = 16 * 8, 4 * 8 * 8, 8


def test_parameters_and_steps_are_told(tmp_path: Path) -> None:
    text, first = dry_run(recipe_for(tmp_path, accumulation=2), make_objective(), ToyBatches(), 12)
    for line in (
        f"parameters trained: {TABLE + EXPERTS + NORM}",
        "  table 128",
        "parameters frozen: 8",
        "steps: 12, each of 2 batch(es)",
        "memory on each device of data=1, with the batch below:",
    ):
        assert line in text.splitlines()
    assert first.samples == ["d:1"]


@pytest.mark.parametrize("sizes, experts", [({}, 1), ({"expert": 4}, 4)])
def test_memory_on_each_device(sizes: dict[str, int], experts: int, tmp_path: Path) -> None:
    mesh = make_mesh(jax.devices()[:experts], **sizes) if sizes else None
    told = memory(recipe_for(tmp_path), make_objective(), ToyBatches().step(0), 12, mesh)
    trained = 4 * (TABLE + EXPERTS // experts + NORM)
    assert told["trained parameters"] == told["gradients"] == trained and told["frozen parameters"] == 4 * 8
    counts = told["state of the optimizer"] - 2 * trained
    assert 0 < counts <= 16 and told["work of a step"] > 0
    assert told["all"] == 4 * trained + counts + told["frozen parameters"] + told["work of a step"]
