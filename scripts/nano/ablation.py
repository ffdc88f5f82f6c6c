"""What omni-nano loses without one part of it: copies of its directory that lack the part, for any program.

| removed | how | asked |
|---|---|---|
| deepstack | what the deepstack mergers add to the first layers is zero | scenes |
| time | a second of video is a tenth of a position, not thirteen | when a thing appears |
| routing | in one layer, two experts get each other's tokens | scenes |
| window | the audio encoder's windows have one chunk, not two | strings of digits |

No sense depends on the window, so that the last one shows how little is lost.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from omni_jax.files import read_object, write_whole
from scripts.nano.begin import FILE, write_tensors
from scripts.nano.evaluation import Evaluator, Results, questions, results_of, rows_for_test

# The layer, and the first of its two experts that get each other's tokens; in the first three it matters little.
LAYER, EXPERT = 3, 4

Tensors = dict[str, np.ndarray]


class Ablation(NamedTuple):
    """The sense that depends on the part, and how the part is removed from a config and from tensors, in place."""

    sense: str
    remove: Callable[[dict[str, Any], Tensors], None]


def no_deepstack(config: dict[str, Any], tensors: Tensors) -> None:
    """Zero the last layer of each deepstack merger."""
    for name in [name for name in tensors if name.startswith("thinker.visual.merger_list.") and ".mlp.2." in name]:
        tensors[name] = np.zeros_like(tensors[name])


def no_time(config: dict[str, Any], tensors: Tensors) -> None:
    """Put all frames of a video at almost the same position of time."""
    config["thinker_config"]["position_id_per_seconds"] = 0.1


def no_routing(config: dict[str, Any], tensors: Tensors) -> None:
    """Exchange the rows of a router that choose two experts."""
    router = tensors[f"thinker.model.layers.{LAYER}.mlp.gate.weight"].copy()
    router[[EXPERT, EXPERT + 1]] = router[[EXPERT + 1, EXPERT]]
    tensors[f"thinker.model.layers.{LAYER}.mlp.gate.weight"] = router


def no_window(config: dict[str, Any], tensors: Tensors) -> None:
    """Let each chunk of a sound attend to itself alone."""
    audio = config["thinker_config"]["audio_config"]
    audio["n_window_infer"] = 2 * audio["n_window"]


ABLATIONS = {
    "deepstack": Ablation("scene", no_deepstack),
    "time": Ablation("when", no_time),
    "routing": Ablation("scene", no_routing),
    "window": Ablation("digits", no_window),
}
# Those without which a sense fails.
NEEDED = ("deepstack", "time", "routing")


def write_ablated(model: Path, name: str, directory: Path) -> Path:
    """Write the Hugging Face directory `model` without a part to the new `directory`, which is returned."""
    from safetensors.numpy import load_file

    shutil.copytree(model, directory, ignore=shutil.ignore_patterns(FILE))
    config, tensors = read_object(model / "config.json"), load_file(model / FILE)
    ABLATIONS[name].remove(config, tensors)
    write_whole(directory / "config.json", json.dumps(config, indent=2) + "\n")
    write_tensors(directory, tensors)
    return directory


def evaluate_ablations(evaluator: Evaluator, output: Path) -> dict[str, Results]:
    """What copies without a part have right of the sense that is asked, of replies that are kept or new ones.

    Only a Hugging Face directory can be copied so; there is none of another form.
    """
    if not (evaluator.model / FILE).exists():
        return {}
    for name, ablation in ABLATIONS.items():
        asked = questions(rows_for_test(output, ablation.sense, evaluator.limit), output)
        if evaluator.kept_replies(file_of(name), asked) is None:
            with TemporaryDirectory() as folder:
                without = write_ablated(evaluator.model, name, Path(folder) / name)
                replies = Evaluator(without, output, evaluator.limit, evaluator.dtype).timed_answers(asked)
            evaluator.keep_replies(file_of(name), asked, *replies)
    return read_ablations(evaluator, output)


def read_ablations(evaluator: Evaluator, output: Path) -> dict[str, Results]:
    """The results of the copies of which replies are kept."""
    found: dict[str, Results] = {}
    for name, ablation in ABLATIONS.items():
        if not (evaluator.folder / f"{file_of(name)}.json").exists():
            continue
        rows = rows_for_test(output, ablation.sense, evaluator.limit)
        if (replies := evaluator.kept_replies(file_of(name), questions(rows, output))) is not None:
            found[name] = results_of(ablation.sense, rows, replies)
    return found


def file_of(name: str) -> str:
    """The name under which the replies of a copy without a part are kept."""
    return f"without-{name}"
