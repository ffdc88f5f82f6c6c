"""What the command checks before it reads weights, and what its results are bound to."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate.command import Evaluate, _drafter_digest, _model_digest, evaluate
from omni_jax.flags import MediaFlags
from omni_jax.omni import Omni
from omni_jax.weights import checkpoint
from tests.helpers.datasets import results, score, write
from tests.helpers.flags import command


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
    one, other = (_model_digest(tmp_path / name, None, None, None) for name in ("one", "other"))
    assert one != other and one == _model_digest(shutil.copytree(tmp_path / "one", tmp_path / "copy"), None, None, None)


def test_a_recogniser_is_what_results_depend_on(omnis: Callable[[str], Omni], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    data = write(tmp_path / "rows.jsonl", {"prompt": "Speak."})
    settings = {"task": "speech", "max_frames": 2, "speech_temperature": 0.0}
    score(omnis("small"), model, data, tmp_path / "out", recogniser=f"{__name__}:deaf", **settings)
    with pytest.raises(InputError, match="recogniser was .*:deaf', is .*:recognise'"):
        score(
            omnis("small"), model, data, tmp_path / "out", recogniser="tests.evaluate.test_tasks:recognise", **settings
        )


def test_equal_prompts_draw_each_for_itself(omnis: Callable[[str], Omni], model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *({"prompt": "Once upon", "id": name} for name in "abcd"))

    def said(output: str, **settings: Any) -> list[tuple]:
        score(omnis("small"), model, data, tmp_path / output, **settings)
        return [tuple(result["turns"][0]["token_ids"]) for _, result in sorted(results(tmp_path / output).items())]

    warm = {"temperature": 1.5, "max_new_tokens": 8}
    drawn = said("drawn", **warm)
    assert len(set(drawn)) == 4 and len(set(said("greedy"))) == 1
    assert said("other", seed=1, **warm) != drawn == said("again", slots=3, **warm)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"task": "speech", "speaker": "bob"}, "no speaker 'bob'"),
        ({"task": "speech", "speech_temperature": -1.0}, "speech_temperature is -1"),
        ({"task": "speech", "max_frames": 0}, "max_frames is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"fps": 0.0}, "'fps' is 0"),
        ({"media": MediaFlags(nframes=-1)}, "'nframes' is -1"),
        ({"stop": ("",)}, "stop holds an empty text"),
        ({"stop": ("a", "<|im_end|>")}, "is no text of a reply"),
        ({"media": MediaFlags(nframes=4), "fps": 2.0}, "'nframes' and 'fps' contradict"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": -1, "task": "choice"}, "slots is -1"),
        ({"draft_tokens": 99}, "draft_tokens is 99"),
        ({"drafter": "tiny"}, "the drafter's width"),
    ],
)
def test_wrong_settings_are_told_before_the_weights_are_read(
    settings: dict[str, Any], why: str, model: Path, drafters: Callable[[str, str], Path], tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "Pick.", "choices": ["a", "b"], "answer": 0})
    if "drafter" in settings or "draft_tokens" in settings:
        settings = settings | {"drafter": (drafters("eagle3", settings.get("drafter", "small")),)}
    asked: dict[str, Any] = {"task": "generate", **settings}
    if asked["task"] == "speech":
        asked = {"recogniser": f"{__name__}:deaf", **asked}
    with pytest.raises(InputError, match=why):
        evaluate(command(Evaluate, model=model, data=data, output=tmp_path / "out", **asked), unread)
    assert not (tmp_path / "out").exists()


def unread(parts: tuple[str, ...] | None) -> Omni:
    raise AssertionError("the weights are read")


def test_directories_are_tried_before_the_weights_are_read(
    omnis: Callable[[str], Omni], drafters: Callable[[str, str], Path], model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", {"prompt": "Hi", "reference": "x"}, {"prompt": "Ho"})
    summary = score(omnis("small"), model, data, tmp_path / "out")
    assert summary["rows_skipped"] == 1 and summary["scores"] == {"exact": 0, "exact_normalised": 0}
    (tmp_path / "file").write_text("")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results-00000.jsonl").write_text("")
    one, other = drafters("eagle3", "small"), drafters("dflash", "small")
    for output, settings, why in (
        ("out", {"seed": 1}, "holds another run"),
        ("file", {}, "cannot be written"),
        ("results", {}, "no run.json"),
        ("file", {"drafter": (one, other)}, "cannot be written"),
    ):
        asked = command(Evaluate, model=model, data=data, output=tmp_path / output, **{"max_new_tokens": 6, **settings})
        with pytest.raises(InputError, match=why):
            evaluate(asked, unread)


def test_columns_that_are_not_read_are_named_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", *({"prompt": "Hi", "licence": i, "author": "me"} for i in range(3)))
    with pytest.raises(InputError, match="seed is -1"):
        evaluate(command(Evaluate, model=model, data=data, output=tmp_path / "out", seed=-1), unread)
    assert capsys.readouterr().err == "columns that are not read: 'author', 'licence'\n"
    data = write(tmp_path / "rows.jsonl", {"prompt": "Hi", "author": "me"} | {f"c{i}": i for i in range(30)})
    with pytest.raises(InputError, match="seed is -1"):
        evaluate(command(Evaluate, model=model, data=data, output=tmp_path / "out", seed=-1), unread)
    assert capsys.readouterr().err.endswith(" and 11 more\n")
