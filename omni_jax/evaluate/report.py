"""The report of a run: a summary of plain numbers, and Markdown with plots.

Both follow from the results alone, in the dataset's order, so a run that was killed and resumed gives the report of an
uninterrupted one. Plots need matplotlib and are left out without it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.evaluate.data import Dataset
from omni_jax.evaluate.metrics import accepted_length, real_time_factor, summarise
from omni_jax.evaluate.plots import draw_plots
from omni_jax.evaluate.stored import Result, fits
from omni_jax.files import write_whole

Summary = dict[str, Any]
# Rows and samples that a summary names as not scored; the report names all.
MAX_NAMED = 20


def current_results(dataset: Dataset, results: Iterable[Result]) -> list[Result]:
    """The results of a dataset's samples, in its order, whatever else a directory holds.

    A score counts before a failure, later ones before earlier ones, and what was made of media that have changed since
    does not count.
    """
    known = {sample.id: sample for sample in dataset.samples}
    fitting = [one for one in results if one["id"] in known and fits(one, known[one["id"]])]
    chosen = {one["id"]: one for one in fitting if "error" in one}
    chosen |= {one["id"]: one for one in fitting if "error" not in one}
    return [chosen[sample.id] for sample in dataset.samples if sample.id in chosen]


def summary_of(task: str, dataset: Dataset, results: Sequence[Result]) -> Summary:
    """The results of a dataset's samples, as from `current_results`, in one summary."""
    used = [result for result in results if "error" not in result]
    stats = _stats(used)
    summary: Summary = {
        "task": task,
        "samples": len(dataset.samples),
        "scored": len(used),
        "failed": len(results) - len(used),
        "rows_skipped": len(dataset.problems),
        "scores": summarise([result["scores"] for result in used]),
        "drafting": accepted_length(stats),
        "speech": real_time_factor(stats),
    }
    if missing := not_scored(dataset, results):
        summary["not_scored"] = [{"where": where, "why": why} for where, why in missing[:MAX_NAMED]]
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


def not_scored(dataset: Dataset, results: Sequence[Result]) -> list[tuple[str, str]]:
    """Where each row or sample is that could not be used, and why: rows in the dataset's order, then samples."""
    failed = [(f"sample {result['id']}", result["error"]) for result in results if "error" in result]
    return [*((problem.where, problem.why) for problem in dataset.problems), *failed]


def all_scored(summary: Summary) -> bool:
    """Whether every row of the dataset was scored, by every drafter where a summary holds several."""
    several = [summary] if isinstance(summary.get("task"), str) else summary.values()
    return all(one["scored"] == one["samples"] and not one["rows_skipped"] for one in several)


def write_report(
    directory: Path, summary: Summary, dataset: Dataset, results: Sequence[Result], fingerprint: dict[str, Any]
) -> None:
    """Write report.md, summary.json and the plots of the results of a dataset's samples, as from `current_results`."""
    used = [result for result in results if "error" not in result]
    lines = [f"# Evaluation: {summary['task']}", ""]
    lines += [f"{summary['scored']} of {summary['samples']} samples scored"]
    lines[-1] += f", {summary['failed']} failed, {summary['rows_skipped']} rows of the dataset skipped."
    lines += ["", *_table(("score", "value"), _flat(summary["scores"] | summary["drafting"] | summary["speech"]))]
    if "replies" in summary:
        lines += ["## Replies", "", *_table(("what", "value"), _flat(summary["replies"]))]
    if "categories" in summary:
        lines += ["## By category", "", *_category_table(summary["categories"])]
    scores = {name: summarise([result["scores"] for result in some]) for name, some in _by_category(used).items()}
    lines += [f"![{title}]({name})\n" for name, title in draw_plots(directory, _stats(used), scores)]
    if missing := not_scored(dataset, results):
        lines += ["## What could not be used", "", *_table(("where", "why"), missing)]
    lines += ["## Settings", "", *_table(("setting", "value"), _flat(fingerprint))]
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
    """A table in Markdown, with an empty line after it; nothing without rows."""
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return [*("| " + " | ".join(line) + " |" for line in cells), ""]


def _category_table(categories: dict[str, dict[str, float]]) -> list[str]:
    columns = list(dict.fromkeys(name for values in categories.values() for name in values))
    rows = [(name, *(_number(values.get(column)) for column in columns)) for name, values in categories.items()]
    return _table(("category", *columns), rows)
