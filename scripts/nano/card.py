"""The stage card: docs/nano.md, its figures and plots, from what the other stages left.

    evaluation/*.json, metrics of stages, sizes -> docs/nano/figures.json -> card.md filled in -> docs/nano.md
    metrics.csv -> docs/nano/loss-<stage>.png;  evaluation/*.wav -> docs/nano/*.wav

The text follows from card.md and figures.json alone, so that a test can compare it.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from shutil import copyfile
from string import Template
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.files import write_whole
from scripts.nano.judging import interval
from scripts.nano.spoken import share
from scripts.nano.words import DIGITS

TEMPLATE = Path(__file__).with_name("card.md")
FIGURES = "figures.json"
# Where a stage writes its metrics. Those of the codec have no header.
METRICS = {stage: f"{stage}/metrics.csv" for stage in ("thinker", "talker", "dflash", "eagle3")} | {
    "codec": "codec.csv"
}
CODEC_COLUMNS = ("step", "seconds", "loss", "committed")
# Accuracies under other conditions, numbers understood and words misunderstood.
ROBUST, UNDERSTOOD, MISUNDERSTOOD = 0.85, 0.9, 0.2

Figures = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What a sense is asked, and the share of right answers that it should reach."""

    kind: str
    asked: str
    sense: str
    least: float


GOALS = (
    Goal("hear", "one spoken digit, of voices never trained on", "digit", 0.95),
    Goal("hear", "strings of two to five digits, all in order", "digits", 0.85),
    Goal("hear", "silence, noise, a beep or music is said to be that", "silence", 0.85),
    Goal("see", "one handwritten digit, of a collection never trained on", "written", 0.95),
    Goal("see", "scenes: colour, shape, number and place", "scene", 0.95),
    Goal("see", "several pictures compared", "compare", 0.95),
    Goal("read", "words of one to three syllables, in fonts never trained on", "read", 0.9),
    Goal("watch", "which way a thing moves, or which thing does", "move", 0.9),
    Goal("watch", "after how many seconds it appears", "when", 0.9),
    Goal("watch and listen", "which came first, the flash or the beep", "flash", 0.9),
    Goal("watch and listen", "the digit said while the square is red", "red", 0.9),
    Goal("both", "is the written digit the one that is said?", "same", 0.95),
    Goal("remember", "a word told in an earlier turn", "remember", 0.95),
    Goal("remember", "a digit heard in an earlier turn", "heard", 0.95),
    Goal("remember", "a digit or a thing shown in an earlier turn", "shown", 0.95),
    Goal("text", "counting", "count", 0.95),
    Goal("text", "adding up to 20", "add", 0.95),
    Goal("text", "spelling", "spell", 0.95),
    Goal("text", "repeating a phrase", "repeat", 0.95),
)


def write_card(output: Path, model: Path, docs: Path, seed: int) -> Path:
    """Write the card, its figures, plots and sounds into `docs`: the card. InputError without results of a sense."""
    figures = figures_of(output, model, seed)
    (docs / "nano").mkdir(parents=True, exist_ok=True)
    for stage in figures["stages"]:
        _draw(docs / "nano" / f"loss-{stage}.png", *_curve(output / METRICS[stage]))
    for example in figures["speech"].get("examples", ()):
        copyfile(output / "evaluation" / example["file"], docs / "nano" / example["file"])
    write_whole(docs / "nano" / FIGURES, json.dumps(figures, indent=1) + "\n")
    write_whole(docs / "nano.md", text_of(figures))
    return docs / "nano.md"


def figures_of(output: Path, model: Path, seed: int) -> Figures:
    """All figures of the card, plain JSON values."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(output.glob("evaluation/*.json"))}
    senses = {goal.sense: found[goal.sense] for goal in GOALS if goal.sense in found}
    if not senses:
        raise InputError(f"{output}/evaluation holds no results; run the stage evaluate first")
    stages = {stage: _ran(output / path) for stage, path in METRICS.items() if (output / path).exists()}
    robust = found.get("robust", {}).get("conditions", {})
    return {
        "seed": seed,
        "parameters": _parameters(model),
        "senses": senses,
        "robust": robust,
        "speech": found.get("speech", {}),
        "stages": stages,
    }


def _parameters(model: Path) -> dict[str, int]:
    """The parameters of each part of a model."""
    import jax

    from omni_jax.loading import load_lazily

    params = load_lazily(model).params
    return {part: sum(int(np.prod(one.shape)) for one in jax.tree.leaves(tree)) for part, tree in params.items()}


def _curve(path: Path) -> tuple[list[float], list[float]]:
    """Steps and losses of a file of metrics."""
    rows = list(csv.reader(path.read_text().splitlines()))
    names = list(CODEC_COLUMNS) if path.name == "codec.csv" else rows.pop(0)
    step, loss = names.index("step"), names.index("loss")
    return [float(row[step]) for row in rows], [float(row[loss]) for row in rows]


def _ran(path: Path) -> dict[str, float]:
    steps, losses = _curve(path)
    return {"steps": steps[-1], "first": losses[0], "last": float(np.mean(losses[-10:]))}


def _draw(path: Path, steps: Sequence[float], losses: Sequence[float]) -> None:
    """Draw a loss over the steps, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure, picture = Figure(figsize=(5, 2.6), layout="constrained"), BytesIO()
    axes = figure.subplots()
    axes.semilogy(steps, losses, linewidth=0.9)
    axes.set(xlabel="Step", ylabel="Loss")
    axes.grid(alpha=0.3)
    figure.savefig(picture, format="png", dpi=110)
    write_whole(path, picture.getvalue())


def text_of(figures: Figures) -> str:
    """The card of some figures."""
    total = sum(figures["parameters"].values())
    return Template(TEMPLATE.read_text()).substitute(
        parameters=f"{total / 1e6:.1f} million",
        parts=_table(("part", "parameters"), [(part, f"{n:,}") for part, n in figures["parameters"].items()]),
        goals=_goals(figures["senses"]),
        short=_short(figures),
        voices=_voices(figures["senses"]),
        confusion=_confusions(figures["senses"]),
        robust=_robust(figures["robust"]),
        recogniser=figures["speech"].get("recogniser", "a recogniser"),
        speech=_speech(figures["speech"]),
        examples=_examples(figures["speech"]),
        failures=_failures(figures["senses"]),
        stages=_stages(figures["stages"]),
        seed=figures["seed"],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _whole(value: float) -> str:
    return f"{100 * value:.0f} %"


def _goals(senses: Mapping[str, Any]) -> str:
    rows = []
    for goal in GOALS:
        if (one := senses.get(goal.sense)) is None:
            rows.append((goal.kind, goal.asked, _whole(goal.least), "not measured", "", "", ""))
            continue
        low, high = interval(one["right"], one["samples"])
        right, verbatim = (_percent(share(one, name, "samples")) for name in ("right", "verbatim"))
        within = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append((goal.kind, goal.asked, _whole(goal.least), right, within, verbatim, one["samples"]))
    return _table(("sense", "asked", "goal", "right", "interval", "word for word", "samples"), rows)


def _short(figures: Figures) -> str:
    """What falls short of its goal, in words."""
    behind = [
        f"{goal.sense} ({_percent(share(one, 'right', 'samples'))} of {_whole(goal.least)})"
        for goal in GOALS
        if (one := figures["senses"].get(goal.sense)) and share(one, "right", "samples") < goal.least
    ]
    behind += [
        f"{name} ({_percent(share(one, 'right', 'samples'))} of {_whole(ROBUST)})"
        for name, one in figures["robust"].items()
        if share(one, "right", "samples") < ROBUST
    ]
    for speaker, one in figures["speech"].get("speakers", {}).items():
        numbers, words = share(one["said"], "numbers_heard", "numbers"), share(one["said"], "errors", "words")
        if numbers < UNDERSTOOD or words > MISUNDERSTOOD:
            behind.append(
                f"{speaker}'s speech ({_percent(numbers)} of numbers right, {_percent(words)} of words wrong)"
            )
    missing = [goal.sense for goal in GOALS if goal.sense not in figures["senses"]]
    lines = [f"Short of its goal: {', '.join(behind)}." if behind else "Everything that was measured reaches its goal."]
    return "\n".join([*lines, *([f"Not measured: {', '.join(missing)}."] if missing else [])])


def _voices(senses: Mapping[str, Any]) -> str:
    """Accuracy by voice of the senses that tell it."""
    told = {name: one["voices"] for name, one in senses.items() if "voices" in one}
    names = sorted({voice for voices in told.values() for voice in voices})

    def cell(count: list[int] | None) -> str:
        return "" if count is None else f"{count[0]} of {count[1]}"

    rows = [(name, *(cell(voices.get(name)) for voices in told.values())) for name in names]
    return _table(("right, by voice or sound", *told), rows) if told else ""


def _confusions(senses: Mapping[str, Any]) -> str:
    parts = []
    for sense, one in senses.items():
        if "confusion" in one:
            head = (f"**{sense}**", *map(str, range(10)), "none")
            rows = [(f"{i} {DIGITS[i]}", *(n or "" for n in row)) for i, row in enumerate(one["confusion"])]
            parts.append(_table(head, rows))
    return "\n\n".join(parts)


def _robust(conditions: Mapping[str, Any]) -> str:
    rows = []
    for name, one in conditions.items():
        low, high = interval(one["right"], one["samples"])
        within = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append((name, _percent(share(one, "right", "samples")), within, one["samples"]))
    return _table(("condition", "right", "interval", "samples"), rows) if rows else "Not measured."


def _speech(speech: Mapping[str, Any]) -> str:
    rows = []
    for speaker, one in speech.get("speakers", {}).items():
        for name in ("said", "ceiling", "floor"):
            counts = one[name]
            numbers, errors = share(counts, "numbers_heard", "numbers"), share(counts, "errors", "words")
            what = "omni-nano" if name == "said" else name
            rows.append((speaker, what, _percent(numbers), _percent(errors), counts["numbers"], counts["words"]))
    head = ("speaker", "", "numbers right", "word error", "numbers", "words")
    return _table(head, rows) if rows else "Not measured."


def _examples(speech: Mapping[str, Any]) -> str:
    rows = [
        (one["speaker"], one["asked"], one["said"], one["heard"], f"[listen](nano/{one['file']})")
        for one in speech.get("examples", ())
    ]
    return _table(("speaker", "asked", "answered", "heard by the recogniser", ""), rows) if rows else ""


def _failures(senses: Mapping[str, Any]) -> str:
    rows = [
        (sense, wrong["asked"], wrong["right"], wrong["reply"])
        for sense, one in senses.items()
        for wrong in one["failures"][:2]
    ]
    return _table(("sense", "asked", "right", "answered"), rows) if rows else "None."


def _stages(stages: Mapping[str, Any]) -> str:
    rows = [
        (stage, f"{one['steps']:.0f}", f"{one['first']:.3g}", f"{one['last']:.3g}", f"![loss](nano/loss-{stage}.png)")
        for stage, one in stages.items()
    ]
    return _table(("stage", "steps", "loss at first", "at last", ""), rows) if rows else ""
