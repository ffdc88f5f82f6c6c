"""The key map and the modules state the same parameters, shape by shape and axis by axis."""

import json
from pathlib import Path

import jax
import pytest

from omni_jax.config import OmniConfig
from omni_jax.models.code2wav import Code2Wav
from omni_jax.models.param import declare
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.weights.keymap import destination_axes, destination_shapes
from scripts.small.configs import config_dict

MODULES = {"thinker": Thinker, "talker": Talker}


@pytest.mark.parametrize("part", MODULES)
@pytest.mark.parametrize("variant", ["tiny", "small", "odd", "medium", "public"])
def test_the_key_map_fills_what_the_modules_declare(variant: str, part: str, data_dir: Path) -> None:
    public = json.loads((data_dir / "public_config.json").read_text())
    config = OmniConfig.from_hf(public if variant == "public" else config_dict(variant))
    declaration = declare(MODULES[part], getattr(config, part))
    assert jax.tree.map(lambda x: x.shape, declaration.shapes) == destination_shapes(config)[part]
    assert declaration.axes == destination_axes(config)[part]


@pytest.mark.parametrize("variant", ["tiny", "small", "odd", "medium", "public"])
def test_the_key_map_fills_what_code2wav_declares(variant: str, data_dir: Path) -> None:
    public = json.loads((data_dir / "public_config.json").read_text())
    config = OmniConfig.from_hf(public if variant == "public" else config_dict(variant))
    declaration = declare(Code2Wav, config.code2wav)
    assert jax.tree.map(lambda x: x.shape, declaration.shapes) == destination_shapes(config)["code2wav"]
    assert declaration.axes == destination_axes(config)["code2wav"]
