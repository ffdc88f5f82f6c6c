"""The programs of training steps are those of runs: lowered for shapes, on meshes, without weights."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from omni_jax.config import OmniConfig
from omni_jax.models.param import declare
from omni_jax.omni import PARTS
from omni_jax.sharding import make_mesh
from omni_jax.weights.mesh_text import parse_mesh
from scripts.aot.programs import Target
from scripts.aot.train_programs import RECIPES, held, train_programs
from scripts.small.configs import config_dict


def target_on(mesh: str) -> Target:
    """The tiny Thinker on virtual devices of this machine."""
    config, devices = OmniConfig.from_hf(config_dict("tiny")), make_mesh(**parse_mesh(mesh))
    declared = {"thinker": declare(PARTS["thinker"], config.thinker, mesh=devices)}
    return Target(config, declared, jax.devices()[0], devices, jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize("name", RECIPES)
def test_both_programs_of_a_step_are_lowered(name: str) -> None:
    target = target_on("fsdp=2,expert=2")
    add, update = train_programs(target, (name,), rows=4, tokens=64)
    assert (add.name, update.name, add.tokens) == (f"{name} add", f"{name} update", 256)
    for program in (add, update):
        # Sums, and the state in an update, are changed in place.
        assert donated(program.lower()) > 0, program.name


def donated(lowered: Any) -> int:
    return sum(info.donated for info in jax.tree.leaves(lowered.args_info))


def test_a_device_holds_its_part() -> None:
    """Of all that is trained nothing is left whole by a mesh of two that divides it, but norms over other widths."""
    whole, half = (held(target_on(mesh), "sft") for mesh in ("data=2", "fsdp=2"))
    assert half["moments"] == pytest.approx(2 * half["trained"], rel=1e-5)
    assert half["trained"] == half["gradients"]
    assert half["trained"] == pytest.approx(whole["trained"] / 2, rel=0.01)


def test_only_what_is_trained_is_held_in_float32() -> None:
    target = target_on("data=2")
    sft, lora, dflash = (held(target, name) for name in RECIPES)
    # The Thinker's text model is what both recipes leave as it is, in half the bytes.
    assert lora["frozen"] == dflash["frozen"] == pytest.approx(sft["trained"] / 2 + sft["frozen"])
    assert lora["trained"] < dflash["trained"]
