"""Whether config.json can belong to the weights in its directory, before anything is built from its numbers."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omni_jax.errors import CheckpointError

# What config.json counts and a checkpoint holds one by one, each with arrays or tensors of its own.
COUNTS = (
    *(f"thinker_config.{x}" for x in ("text_config.num_hidden_layers", "text_config.num_experts")),
    *(f"thinker_config.{x}" for x in ("vision_config.depth", "audio_config.encoder_layers")),
    *(f"talker_config.{x}" for x in ("text_config.num_hidden_layers", "text_config.num_experts", "num_code_groups")),
    *("talker_config.code_predictor_config.num_hidden_layers", "code2wav_config.num_hidden_layers"),
    *("thinker_config.vision_config.deepstack_visual_indexes", "thinker_config.text_config.mlp_only_layers"),
)
STAGES = ("code2wav_config.upsample_rates", "code2wav_config.upsampling_ratios")


def check_counts(values: dict, names: Iterable[str], most: int, directory: Path) -> None:
    """CheckpointError if config.json counts more layers, experts or stages than a checkpoint can hold.

    Called before anything is built from these counts.

    Args:
        values: the parsed config.json.
        names: the names of the checkpoint's tensors or arrays.
        most: how many layers or experts these can hold at most.
        directory: of the checkpoint, for the error.
    """
    stages = len({tuple(re.split("[./]", name)[:3]) for name in names if name.startswith("code2wav")})
    for name in (*COUNTS, *STAGES):
        found: Any = values
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        found = len(found) if isinstance(found, list) else found
        limit = stages if name in STAGES and stages else most
        if isinstance(found, int) and found > limit:
            raise CheckpointError(
                f"{directory}: its config.json counts {str(found)[:20]} in {name}, more than these weights can "
                f"hold ({limit:,}); take the config.json that belongs to them"
            )
