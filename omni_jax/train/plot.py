"""The loss of a run as a picture, from its metrics.csv. It needs matplotlib and is left out without it."""

import csv
import io
from importlib.util import find_spec
from pathlib import Path

from omni_jax.errors import InputError
from omni_jax.files import read_text, write_whole
from omni_jax.train.metrics import METRICS

PICTURE = "loss.png"
# Weight of the mean of earlier rows in the smooth line, for runs of many rows.
SMOOTHING = 0.9


def read_metrics(output: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics by name; InputError if it has none, or they are no numbers."""
    path = output / METRICS
    rows = [*csv.reader(io.StringIO(read_text(path, error=InputError, remedy="name the directory of a run")))]
    if len(rows) < 2:
        raise InputError(f"{path}: has no row yet; wait for --log-every steps")
    try:
        columns = zip(*([float(value) for value in row] for row in rows[1:]), strict=True)
        return dict(zip(rows[0], map(list, columns), strict=True))
    except ValueError:
        raise InputError(f"{path}: holds something that is no number; remove that line") from None


def draw_loss(output: Path) -> Path | None:
    """Draw the loss over the steps into the run's directory: the picture, or None without matplotlib.

    Raises InputError as `read_metrics`, and OSError for a picture that cannot be written.
    """
    columns = read_metrics(output)
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure, picture = Figure(figsize=(7, 4), layout="constrained"), io.BytesIO()
    axes = figure.subplots()
    axes.plot(columns["step"], columns["loss"], alpha=0.4, label="loss")
    axes.plot(columns["step"], smooth(columns["loss"]), label="smoothed")
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss")
    axes.legend()
    figure.savefig(picture, format="png", dpi=150)
    write_whole(output / PICTURE, picture.getvalue())
    return output / PICTURE


def smooth(values: list[float]) -> list[float]:
    """Exponential moving means, which begin at the first value."""
    means = values[:1]
    for value in values[1:]:
        means.append(SMOOTHING * means[-1] + (1 - SMOOTHING) * value)
    return means
