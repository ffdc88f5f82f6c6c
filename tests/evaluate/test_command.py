"""What the command checks before it reads weights, and what its results are bound to."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax import checkpoint
from omni_jax.errors import InputError
from omni_jax.evaluate.command import _drafter_digest, _model_digest
from omni_jax.omni import Omni
from tests.evaluate.test_tasks import results, score, write


def deaf(wave: np.ndarray, rate: int) -> str:
    """A recogniser that hears nothing."""
    return ""


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_digests_are_of_the_weights(
    model: Path, drafters: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = shutil.copytree(drafters("eagle3", "small"), tmp_path / "drafter")
    before = _drafter_digest(drafter)
    assert before == _drafter_digest(drafters("eagle3", "small"))
    flip_last_byte(next(iter(drafter.glob("*.safetensors"))))
    assert _drafter_digest(drafter) != before

    # As several processes write a checkpoint, none of which sees an array whole: without hashes.
    monkeypatch.setattr(type(jnp.ones(1)), "is_fully_addressable", False)
    for name, value in (("one", 1.0), ("same", 1.0), ("other", 2.0)):
        params = {"thinker": {"embed": jnp.full((4, 4), value)}}
        manifest = checkpoint.save(tmp_path / name, params, model)
        assert not manifest.leaves["thinker/embed"].sha256
    one, other = (_model_digest(tmp_path / name, None) for name in ("one", "other"))
    assert one != other and one == _model_digest(shutil.copytree(tmp_path / "one", tmp_path / "copy"), None)


def test_a_recogniser_is_what_results_depend_on(omnis: Callable[[str], Omni], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    data = write(tmp_path / "rows.jsonl", {"prompt": "Speak."})
    settings = {"task": "speech", "max_frames": 2, "speech_temperature": 0.0}
    score(omnis("small"), model, data, tmp_path / "out", recogniser=f"{__name__}:recognise", **settings)
    with pytest.raises(InputError, match="recogniser was .*:recognise', is .*:deaf'"):
        score(omnis("small"), model, data, tmp_path / "out", recogniser=f"{__name__}:deaf", **settings)


def test_equal_prompts_draw_each_for_itself(omnis: Callable[[str], Omni], model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *({"prompt": "Once upon", "id": name} for name in "abcd"))

    def said(output: str, **settings: Any) -> list[tuple]:
        score(omnis("small"), model, data, tmp_path / output, **settings)
        return [tuple(result["turns"][0]["token_ids"]) for _, result in sorted(results(tmp_path / output).items())]

    warm = {"temperature": 1.5, "max_new_tokens": 8}
    drawn = said("drawn", **warm)
    assert len(set(drawn)) == 4 and len(set(said("greedy"))) == 1
    assert said("other", seed=1, **warm) != drawn == said("again", slots=3, **warm)
