"""Adapters of PEFT: read, checked and merged, they give what PEFT gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax as oj
from tests.helpers.adapters import ATTENTION, EXPERTS, TOKENS, fresh, logits, wrap

pytest.importorskip("peft")

# Settings of adapters as people make them, by name.
WRITTEN: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 24},
    # PEFT fuses these: gate and up with twice the rank.
    "everything": {"target_modules": [*ATTENTION, *EXPERTS, "gate"], "r": 4, "lora_alpha": 12},
    "parameters": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 3, "lora_alpha": 12},
    "down alone": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 2, "lora_alpha": 4},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "use_rslora": False,
        "rank_pattern": {"v_proj": 6, r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"q_proj": 40},
    },
    "rslora": {"target_modules": ["k_proj", "o_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [2], "r": 4, "lora_alpha": 32},
    "encoders": {"target_modules": ["qkv", "linear_fc1", "out_proj", "fc2", "lm_head"], "exclude_modules": None, "r": 4},
}  # fmt: skip


@pytest.fixture(scope="session")
def written(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`written(name)`: the directory that peft wrote for the Thinker of "small", and the logits of peft's own model."""
    made: dict[str, tuple[Path, np.ndarray]] = {}

    def write(name: str) -> tuple[Path, np.ndarray]:
        if name not in made:
            model, directory = fresh(checkpoints("small")), tmp_path_factory.mktemp("adapters") / name
            wrapped = wrap(model.thinker, **WRITTEN[name])
            wrapped.save_pretrained(directory)
            made[name] = directory, logits(wrapped)
        return made[name]

    return write


def merged_logits(omni: oj.Omni) -> np.ndarray:
    return np.asarray(jax.jit(lambda ids: omni.thinker(ids))(TOKENS))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_peft_gives_the_logits_of_peft(name: str, written: Any, checkpoints: Any) -> None:
    directory, want = written(name)
    omni = oj.load(checkpoints("small"), parts=("thinker",), adapter=directory)
    np.testing.assert_allclose(merged_logits(omni), want, atol=5e-4)
