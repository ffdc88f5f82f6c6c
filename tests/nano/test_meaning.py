"""The shipped model answers by what it hears and sees: without one of its parts, the sense that needs it fails.

Rows are those of `tests/data/nano`, on which no stage was trained.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax as oj
from omni_jax.omni import Omni
from omni_jax.rows.media import located
from omni_jax.weights.locate import NANO
from scripts.nano.ablation import ABLATIONS, write_ablated
from scripts.nano.judging import is_right

pytestmark = pytest.mark.skipif(not NANO.exists(), reason="the package has no trained model")

# What the whole model must have right of each sense, and how much of that a part takes with it.
SHARES, LOST = {"scene": 0.8, "written": 0.8, "when": 0.8, "digits": 0.8, "red": 0.8}, 0.25
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def omni() -> Omni:
    return oj.load("nano")


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> Callable[[str], Rows]:
    """The rows of a sense, with places of media that can be opened."""

    def of(sense: str) -> Rows:
        found = map(json.loads, (data_dir / "nano" / f"{sense}.jsonl").read_text().splitlines())
        return [{**row, "asked": located(row["messages"][:-1], data_dir / "nano")} for row in found]

    return of


def share(omni: Omni, rows: Rows) -> float:
    """The share of rows that a model answers right."""
    asked: list[list[dict[str, Any]]] = [row["asked"] for row in rows]
    replies = omni.generate(asked, max_new_tokens=40)
    return float(np.mean([is_right(row, reply.text) for row, reply in zip(rows, replies, strict=True)]))


@pytest.fixture(scope="module")
def whole(omni: Omni, rows: Callable[[str], Rows]) -> dict[str, float]:
    return {sense: share(omni, rows(sense)) for sense in SHARES}


def test_the_whole_model_answers(whole: dict[str, float]) -> None:
    assert {sense: found for sense, found in whole.items() if found < SHARES[sense]} == {}


@pytest.mark.parametrize("part", ABLATIONS)
def test_a_sense_fails_without_its_part(
    part: str, whole: dict[str, float], rows: Callable[[str], Rows], tmp_path: Path
) -> None:
    sense = ABLATIONS[part].sense
    without = oj.load(write_ablated(NANO, part, tmp_path / part), parts=("thinker",))
    assert share(without, rows(sense)) < whole[sense] - LOST
