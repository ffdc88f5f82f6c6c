"""The processor of a small checkpoint, with the public chat template."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_jax.config import OmniConfig
from omni_jax.inputs.options import Options
from omni_jax.inputs.processor import Processor
from omni_jax.train.data.samples import TextRecipe


@pytest.fixture(scope="session")
def processor(checkpoints: Callable[[str], Path], data_dir: Path) -> Processor:
    directory = checkpoints("tiny")
    config = OmniConfig.from_hf(json.loads((directory / "config.json").read_text()))
    return Processor.from_dir(directory, config)


@pytest.fixture(scope="session")
def recipe(processor: Processor) -> TextRecipe:
    """Samples of at most 300 tokens, with small pictures."""
    return TextRecipe.of(processor, 300, options=Options(max_pixels=64 * 64, nframes=4))
