"""What is reported of compared drafters: figures, a table, a plot."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from omni_jax.decode.draft.acceptance import (
    acceptance_curve,
    conditional,
    interval,
    mean_accepted,
    mean_accepted_per_reply,
)
from scripts.bench.options import Drafters

COLUMNS = ("tokens/s", "x plain", "per round", "mean", "95 %", "rounds", "drafted", "verified", "experts", "differing")
LINE = "{:<32}{:>10}{:>9}{:>10}{:>7}{:>15}{:>8}{:>9}{:>10}{:>9}{:>11}"


def figures(way: Any, plain: Any) -> dict[str, Any]:
    """Figures of a `Way`; `plain` is the plain loop's."""
    rate = way.tokens / way.seconds
    found: dict[str, Any] = {"tokens_per_second": rate, "gain": rate * plain.seconds / plain.tokens}
    replies = [reply for reply in way.replies if len(reply.given)]
    if not replies:
        return found
    curve = acceptance_curve(replies)
    low, high = interval(replies, partial(acceptance_curve, positions=len(curve)))
    return found | {
        "tokens_per_round": mean_accepted(replies),
        "tokens_per_round_interval": [float(bound) for bound in interval(replies, mean_accepted)],
        "tokens_per_round_by_reply": mean_accepted_per_reply(replies),
        "acceptance": curve.tolist(),
        "acceptance_low": low.tolist(),
        "acceptance_high": high.tolist(),
        "conditional": conditional(curve).tolist(),
        "rounds": sum(len(r.given) for r in replies),
        "drafted": way.drafted,
        "verified": way.verified,
        "experts_per_verify": float(np.mean(way.experts)),
        "differing": way.differing,
    }


def table(options: Drafters, found: dict[str, dict[str, Any]]) -> str:
    """The figures of every way, by its name, as text."""
    lines = [
        f"{options.prompts.name}, first turns; at most {options.new} new tokens, batch {options.batch}, "
        f"{options.dtype}; tokens per round include the target's own",
        LINE.format("", *COLUMNS),
    ]
    for name, way in found.items():
        cells = [f"{way['tokens_per_second']:.1f}", f"{way['gain']:.2f}"]
        if "rounds" in way:
            low, high = way["tokens_per_round_interval"]
            cells += [f"{way['tokens_per_round']:.2f}", f"{way['tokens_per_round_by_reply']:.2f}"]
            cells += [f"{low:.2f} to {high:.2f}", *(str(way[key]) for key in ("rounds", "drafted", "verified"))]
            cells += [f"{way['experts_per_verify']:.1f}", str(way["differing"])]
        lines.append(LINE.format(name, *cells, *[""] * (len(COLUMNS) - len(cells))))
    for title, key in (
        ("rounds in which all drafts up to a position were accepted", "acceptance"),
        ("the same, of rounds in which all before it were accepted", "conditional"),
    ):
        lines += ["", title]
        curves = {name: way[key] for name, way in found.items() if key in way}
        lines += [f"{name:<32}" + "".join(f"{value:>7.3f}" for value in curve) for name, curve in curves.items()]
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the acceptance curves with their 95 % intervals to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    curves = {name: way for name, way in found.items() if "acceptance" in way}
    for name, way in curves.items():
        position = np.arange(1, len(way["acceptance"]) + 1)
        label = f"{name}: {way['tokens_per_round']:.2f} per round"
        (line,) = axes.plot(position, way["acceptance"], marker="o", label=label)
        bounds = way["acceptance_low"], way["acceptance_high"]
        axes.fill_between(position, *bounds, alpha=0.2, color=line.get_color())
    axes.set(xlabel="position of a draft", ylabel="rounds in which all drafts up to it were accepted", ylim=(0, 1.02))
    axes.set_xticks(range(1, 1 + max((len(way["acceptance"]) for way in curves.values()), default=1)))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finite(value: Any) -> Any:
    """The same with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
