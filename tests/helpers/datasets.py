"""Datasets and results of evaluations."""

import json
from pathlib import Path
from typing import Any

from omni_jax.evaluate.command import Evaluate, evaluate
from omni_jax.evaluate.data import Sample
from omni_jax.evaluate.processes import share
from omni_jax.evaluate.stored import read_all
from omni_jax.omni import Omni
from tests.helpers.flags import command


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


NEW = 6


def score(omni: Omni, model: Path, data: Path, output: Path, **settings: Any) -> dict:
    """The summary of an evaluation; max_new_tokens=None for a task that writes no replies."""
    asked = {"max_new_tokens": NEW, "slots": 2, **settings}
    asked = {name: value for name, value in asked.items() if value is not None}
    return evaluate(command(Evaluate, model=model, data=data, output=output, **asked), lambda parts: omni)


def results(output: Path) -> dict[str, dict]:
    return {result["id"]: result for result in read_all(output)}


ALONE = share(0, 1, own_model=True)

SAMPLES = [Sample(str(i), [], category="ab"[i % 2]) for i in range(12)]

WORDS = "".join(f"word {i} " for i in range(40)) + "ü"


def result(sample: Sample) -> dict:
    stats = {"new_tokens": int(sample.id), "finish_reason": "stop", "rounds": 2, "tokens_per_round": 1.5}
    stats |= {"round_tokens": [1, 2], "round_most": [4, 4]}
    turns = [{"text": WORDS, "token_ids": [], "stats": stats}]
    return {"id": sample.id, "category": sample.category, "scores": {"exact": int(sample.id) % 3 / 2}, "turns": turns}
