"""What omni-nano loses without one part of it: copies of its directory that lack the part, for any program.

| removed | how | asked |
|---|---|---|
| deepstack | what the deepstack mergers add to the first layers is zero | scenes |
| time | a second of video is a tenth of a position, not thirteen | when a thing appears |
| routing | in one layer, two experts get each other's tokens | scenes |

The window of the audio encoder is not among them, because no sense depends on it: strings of digits are heard as well
with windows of one chunk or of ten as with those of two.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omni_jax.files import read_object, write_whole
from scripts.nano.begin import FILE, write_tensors

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


ABLATIONS = {
    "deepstack": Ablation("scene", no_deepstack),
    "time": Ablation("when", no_time),
    "routing": Ablation("scene", no_routing),
}


def write_ablated(model: Path, name: str, directory: Path) -> Path:
    """Write the Hugging Face directory `model` without a part to the new `directory`, which is returned."""
    from safetensors.numpy import load_file

    shutil.copytree(model, directory, ignore=shutil.ignore_patterns(FILE))
    config, tensors = read_object(model / "config.json"), load_file(model / FILE)
    ABLATIONS[name].remove(config, tensors)
    write_whole(directory / "config.json", json.dumps(config, indent=2) + "\n")
    write_tensors(directory, tensors)
    return directory
