"""The figures of the card, from what the other stages left: plain JSON values.

    evaluation/<model>-<dtype>/*.json, metrics and times of stages, sizes of files -> figures -> card.py

Only replies of the very model, of all rows as they are now, count; what lacks them is left out, and the card names it.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import read_object
from omni_jax.weights.headers import read_header
from omni_jax.weights.locate import DRAFTERS, locate
from scripts.nano.ablation import ABLATIONS, read_ablations
from scripts.nano.evaluation import Evaluator, Results, read_sense
from scripts.nano.export import trained_drafters
from scripts.nano.robustness import read_robustness
from scripts.nano.rows import made_senses
from scripts.nano.spoken import read_held, read_speech

# Where stages that a recipe trains write their metrics and times; the others have one file of both, that of the codec
# without a header.
RECIPES = {
    "words": "words",
    "look": "look",
    "mixed": "mixed",
    "thinker": "thinker",
    "voice": "voice",
    "talker": "talker",
    **{kind: f"drafters/{kind}" for kind in DRAFTERS},
}
STAGES = ("words", "sight", "look", "mixed", "thinker", "codec", "voice", "talker", *DRAFTERS)
# The senses of whose answers sounds are kept.
LISTENED = ("digits", "scene")
COUNTS = ("samples", "right", "voices")
CODEC_COLUMNS = ("step", "seconds", "loss", "committed")

Figures = dict[str, Any]
# Types that hold weights in fewer bits, by the headings of the card's columns.
NARROW = {"bfloat16": "right in bfloat16", "int8": "right with experts in int8"}


def figures_of(output: Path, model: Path, seed: int) -> Figures:
    """All figures of the card; InputError if no sense has results of this model."""
    evaluator = Evaluator(model, output)
    if not (senses := _senses(evaluator, output)):
        raise InputError(f"{evaluator.folder} has no results of {model}; run the stage evaluate first, without limit")
    robust = read_robustness(evaluator, output)
    return {
        "seed": seed,
        "model": evaluator.identity,
        "sizes": sizes_of(locate(model), output),
        "senses": senses,
        **{held: _narrow(Evaluator(model, output, dtype=held), output) for held in NARROW},
        "robust": {name: {count: one[count] for count in COUNTS if count in one} for name, one in robust.items()},
        "without": {
            name: {"sense": ABLATIONS[name].sense, **{count: one[count] for count in ("samples", "right")}}
            for name, one in read_ablations(evaluator, output).items()
        },
        "speech": _speech(evaluator, output),
        "talker": read_held(output),
        "stages": {stage: ran(output, stage) for stage in STAGES if metrics_of(output, stage).exists()},
        "evaluated": sum(read_object(file)["seconds"] for file in evaluator.folder.glob("*.json")),
    }


def _speech(evaluator: Evaluator, output: Path) -> Results:
    """What was said and heard, with the sounds of some senses."""
    speech, kept = read_speech(evaluator, output), tuple(f"-{sense}.wav" for sense in LISTENED)
    return {**speech, "examples": [one for one in speech["examples"] if one["file"].endswith(kept)]}


def _narrow(evaluator: Evaluator, output: Path) -> dict[str, Results]:
    """How many samples of each sense are right, of those that have results, and of each voice."""
    return {
        name: {count: one[count] for count in COUNTS if count in one}
        for name, one in _senses(evaluator, output).items()
    }


def _senses(evaluator: Evaluator, output: Path) -> dict[str, Results]:
    """The results of every sense that has some."""
    found = {sense: read_sense(evaluator, output, sense) for sense in made_senses(output, "test")}
    return {sense: results for sense, results in found.items() if results is not None}


def sizes_of(model: Path, output: Path) -> dict[str, dict[str, int]]:
    """Parameters of each part of a model, and parameters and bytes of files of all of it and of each drafter.

    Drafters are those beside the model, or those that were trained.
    """
    import jax

    from omni_jax.loading import load_lazily

    params = load_lazily(model).params
    parts = {part: sum(int(np.prod(one.shape)) for one in jax.tree.leaves(tree)) for part, tree in params.items()}
    files = [path for path in model.rglob("*") if path.is_file() and path.relative_to(model).parts[0] not in DRAFTERS]
    sizes = {part: {"parameters": number} for part, number in parts.items()}
    sizes["model"] = {"parameters": sum(parts.values()), "bytes": _bytes(files)}
    beside = {kind: model / kind for kind in DRAFTERS if (model / kind / "config.json").is_file()}
    for kind, place in (beside or trained_drafters(output)).items():
        headers = [read_header(file) for file in place.glob("*.safetensors")]
        number = sum(int(np.prod(tensor.shape)) for header in headers for tensor in header.values())
        sizes[kind] = {"parameters": number, "bytes": _bytes([file for file in place.iterdir() if file.is_file()])}
    return sizes


def _bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def metrics_of(output: Path, stage: str) -> Path:
    """The file of a stage's metrics."""
    return output / RECIPES[stage] / "metrics.csv" if stage in RECIPES else output / f"{stage}.csv"


def ran(output: Path, stage: str) -> dict[str, float]:
    """The steps of a stage, its loss at first and at last, and seconds of training."""
    steps, losses = curve(output, stage)
    if stage in RECIPES:
        seconds = sum(_columns(output / RECIPES[stage] / "timings.csv", "seconds")[0])
    else:
        seconds = _columns(metrics_of(output, stage), "seconds")[0][-1]
    return {"steps": steps[-1], "first": losses[0], "last": float(np.mean(losses[-10:])), "seconds": round(seconds)}


def curve(output: Path, stage: str) -> tuple[list[float], list[float]]:
    """Steps and losses of a stage."""
    steps, losses = _columns(metrics_of(output, stage), "step", "loss")
    return steps, losses


def _columns(path: Path, *names: str) -> list[list[float]]:
    """Columns of a file of metrics."""
    rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
    head: Sequence[str] = CODEC_COLUMNS if path.name == "codec.csv" else rows[0]
    if not rows[0][0].isdecimal():
        rows.pop(0)
    return [[float(row[head.index(name)]) for row in rows] for name in names]
