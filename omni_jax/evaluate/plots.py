"""Plots of a run's results. They need matplotlib and are left out without it, and where it cannot draw them."""

import io
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omni_jax.evaluate.metrics import Scores
from omni_jax.files import reason_of, write_whole

MAX_BARS = 60  # categories in a plot; the report's table holds all
MAX_LABEL = 40  # characters of a category's name
_BAR_INCHES = 0.2


def draw_plots(directory: Path, stats: list[dict[str, Any]], categories: Mapping[str, Scores]) -> list[tuple[str, str]]:
    """Draw what there is to draw: file name and title of each.

    stats: those of all replies. categories: by name, a category's scores, of which the first is drawn.
    """
    if find_spec("matplotlib") is None:
        return []
    drawn = []
    for name, title, values in (
        ("lengths.png", "Tokens per reply", [s["new_tokens"] for s in stats]),
        ("accepted.png", "Tokens per round of drafting, by reply",
         [s["tokens_per_round"] for s in stats if s.get("rounds")]),
    ):  # fmt: skip
        if values and _draw(directory / name, title, "Replies", lambda axes, v=values: axes.hist(v, min(30, len(v)))):
            drawn.append((name, title))
    score = next((name for values in categories.values() for name in values), None)
    if score is not None and len(categories) > 1:
        bars = [(_label(name), values.get(score, 0.0)) for name, values in [*categories.items()][:MAX_BARS]]
        if _draw(directory / "categories.png", score, "Category", lambda axes: _bars(axes, bars), len(bars)):
            drawn.append(("categories.png", f"{score} by category"))
    return drawn


def _draw(path: Path, across: str, up: str, plot: Callable[[Any], Any], bars: int = 0) -> bool:
    """Draw with what the two axes show; whether that could be done. A file that cannot be written is an OSError."""
    from matplotlib.figure import Figure

    picture = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks, once for each, and of NaN
            figure = Figure(figsize=(6, max(3, _BAR_INCHES * bars)), layout="constrained")
            axes = figure.subplots()
            plot(axes)
            for label in (axes.set_xlabel(across), axes.set_ylabel(up)):
                label.set_parse_math(False)
            figure.savefig(picture, format="png", dpi=150)
    except Exception as error:
        print(f"{path.name} cannot be drawn ({reason_of(error)}) and is left out", file=sys.stderr)
        return False
    write_whole(path, picture.getvalue())
    return True


def _bars(axes: Any, bars: Sequence[tuple[str, float]]) -> None:
    """A bar for each name, which is text: a dollar sign begins no formula."""
    labels, heights = zip(*bars, strict=True)
    axes.barh(range(len(bars)), heights)
    axes.set_yticks(range(len(bars)), labels=labels)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)


def _label(name: str) -> str:
    name = "".join(character if character.isprintable() else " " for character in name)
    return name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 3]}..."
