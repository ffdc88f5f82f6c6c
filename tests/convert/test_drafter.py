"""Drafters there and back: the same tensors under the same names, bit for bit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from omni_jax.errors import CheckpointError
from omni_jax.weights.drafter_files import drafter_tensors, write_drafter
from omni_jax.weights.drafters import load_drafter
from scripts.small.drafter import make_drafter
from tests.convert.conftest import read_tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["tiny", "small", "odd"])
@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_there_and_back(kind: str, variant: str, dtype: str, tmp_path: Path) -> None:
    source = make_drafter(tmp_path / "source", variant, kind, dtype=dtype)
    drafter = load_drafter(source)
    before, count = read_tensors(source), write_drafter(drafter, tmp_path / "back")
    after = read_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and count == len(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    configs = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back"))
    assert next(configs) == next(configs)
    again = load_drafter(tmp_path / "back")
    for one, other in zip(jax.tree.leaves(drafter.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_drafter_without_files_gets_the_layouts_own_names(drafters: Callable[[str, str], Path]) -> None:
    loaded = load_drafter(drafters("eagle3", "small"))
    tensors = drafter_tensors(dataclasses.replace(loaded, stored={}))
    assert {"midlayer.self_attn.q_proj.weight", "fc.weight", "embed_tokens.weight", "d2t", "t2d"} < tensors.keys()
    assert tensors["d2t"].dtype == np.int64 and tensors["t2d"].dtype == bool
    assert not any(name.startswith(("model.", "layers.")) for name in tensors)


def test_nothing_is_overwritten(drafters: Callable[[str, str], Path], tmp_path: Path) -> None:
    drafter = load_drafter(drafters("dflash", "tiny"))
    write_drafter(drafter, tmp_path / "one")
    with pytest.raises(CheckpointError, match="exists"):
        write_drafter(drafter, tmp_path / "one")


def test_of_several_processes_one_writes(
    drafters: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = load_drafter(drafters("dflash", "tiny"))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert write_drafter(drafter, tmp_path / "one") > 0 and not any(tmp_path.iterdir())
