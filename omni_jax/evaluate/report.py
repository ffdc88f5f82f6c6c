"""What a run has shown: a summary of plain numbers, and a report in Markdown with plots.

Both follow from the results alone, in the dataset's order, so a run that was killed and resumed reports what it would
have reported at once. Plots need matplotlib and are left out without it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.evaluate.data import Dataset
from omni_jax.evaluate.metrics import accepted_length, real_time_factor, summarise
from omni_jax.evaluate.run import write_whole
from omni_jax.evaluate.tasks import Result

Summary = dict[str, Any]


def found_of(dataset: Dataset, results: Iterable[Result]) -> list[Result]:
    """The results of a dataset's samples, in its order, whatever else a directory holds."""
    by_id = {result["id"]: result for result in results}
    return [by_id[sample.id] for sample in dataset.samples if sample.id in by_id]


def summary_of(task: str, dataset: Dataset, found: Sequence[Result]) -> Summary:
    """What the results of a dataset's samples, as from `found_of`, say together."""
    used = [result for result in found if "error" not in result]
    stats = _stats(used)
    summary: Summary = {
        "task": task,
        "samples": len(dataset.samples),
        "scored": len(used),
        "failed": len(found) - len(used),
        "rows_skipped": len(dataset.problems),
        "scores": summarise([result["scores"] for result in used]),
        "drafting": accepted_length(stats),
        "speech": real_time_factor(stats),
    }
    if stats:
        tokens = [s["new_tokens"] for s in stats]
        reasons = Counter(s["finish_reason"] for s in stats)
        summary["replies"] = {
            "replies": len(stats),
            "new_tokens": sum(tokens),
            "mean_new_tokens": float(np.mean(tokens)),
            "ended_by": dict(sorted(reasons.items())),
        }
    categories = _by_category(used)
    if len(categories) > 1:
        summary["categories"] = {
            name: {
                "samples": len(some),
                **summarise([result["scores"] for result in some]),
                **accepted_length(_stats(some)),
            }
            for name, some in categories.items()
        }
    return summary


def write_report(
    directory: Path, summary: Summary, dataset: Dataset, found: Sequence[Result], depends: dict[str, Any]
) -> None:
    """Write report.md, summary.json and the plots of the results of a dataset's samples, as from `found_of`."""
    used = [result for result in found if "error" not in result]
    failed = [result for result in found if "error" in result]
    lines = [f"# Evaluation: {summary['task']}", ""]
    lines += [f"{summary['scored']} of {summary['samples']} samples scored"]
    lines[-1] += f", {summary['failed']} failed, {summary['rows_skipped']} rows of the dataset skipped."
    lines += ["", *_table(("score", "value"), _flat(summary["scores"] | summary["drafting"] | summary["speech"]))]
    if "replies" in summary:
        lines += ["## Replies", "", *_table(("what", "value"), _flat(summary["replies"]))]
    if "categories" in summary:
        lines += ["## By category", "", *_category_table(summary["categories"])]
    lines += [f"![{title}]({name})\n" for name, title in _plots(directory, used)]
    problems = [(problem.where, problem.why) for problem in dataset.problems]
    problems += [(f"sample {result['id']}", result["error"]) for result in failed]
    if problems:
        lines += ["## What could not be used", "", *_table(("where", "why"), problems)]
    lines += ["## Settings", "", *_table(("setting", "value"), _flat(depends))]
    _write(directory, lines, summary)


def write_comparison(directory: Path, summaries: dict[str, Summary]) -> None:
    """Write report.md and summary.json of several drafters' runs, side by side."""
    names = list(dict.fromkeys(n for s in summaries.values() for n in (*s["scores"], *s["drafting"])))
    rows = [
        (name, *(_number((summary["scores"] | summary["drafting"]).get(column)) for column in names))
        for name, summary in summaries.items()
    ]
    lines = ["# Evaluation of several drafters", "", *_table(("drafter", *names), rows)]
    _write(directory, lines, summaries)


def _write(directory: Path, lines: Sequence[str], summary: dict[str, Any]) -> None:
    write_whole(directory / "report.md", "\n".join(lines).rstrip() + "\n")
    write_whole(directory / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _stats(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [turn["stats"] for result in results for turn in result.get("turns", ())]


def _by_category(results: Sequence[Result]) -> dict[str, list[Result]]:
    names = dict.fromkeys(result["category"] for result in results)
    return {name or "none": [result for result in results if result["category"] == name] for name in names}


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, _number(value)) for name, value in values.items()]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_number(item)}" for key, item in value.items())
    return "" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, with an empty line behind it; nothing without rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return [*("| " + " | ".join(line) + " |" for line in cells), ""]


def _category_table(categories: dict[str, dict[str, float]]) -> list[str]:
    columns = list(dict.fromkeys(name for values in categories.values() for name in values))
    rows = [(name, *(_number(values.get(column)) for column in columns)) for name, values in categories.items()]
    return _table(("category", *columns), rows)


def _plots(directory: Path, results: Sequence[Result]) -> list[tuple[str, str]]:
    """Draw what there is to draw: file name and title of each."""
    if find_spec("matplotlib") is None:
        return []
    stats, drawn = _stats(results), []
    lengths = [s["new_tokens"] for s in stats]
    accepted = [s["tokens_per_round"] for s in stats if s.get("rounds")]
    for name, title, values in (
        ("lengths.png", "Tokens of a reply", lengths),
        ("accepted.png", "Tokens that a round of drafting gave, by reply", accepted),
    ):
        if values:
            bins = min(30, len(values))
            _draw(directory / name, title, "Replies", lambda axes, values=values, bins=bins: axes.hist(values, bins))
            drawn.append((name, title))
    categories = {name: summarise([r["scores"] for r in some]) for name, some in _by_category(results).items()}
    score = next((name for values in categories.values() for name in values), None)
    if score is not None and len(categories) > 1:
        heights = [values.get(score, 0.0) for values in categories.values()]
        _draw(directory / "categories.png", score, "Category", lambda axes: axes.barh(list(categories), heights))
        drawn.append(("categories.png", f"{score} by category"))
    return drawn


def _draw(path: Path, across: str, up: str, plot: Callable[[Any], Any]) -> None:
    """Draw with what the two axes show."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    plot(axes)
    axes.set(xlabel=across, ylabel=up)
    figure.savefig(path, dpi=150)
