"""`omni-jax train`: flags, the file of --config, exit statuses, and fine-tuning from data to a model that loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
from omni_jax.cli import _parsed
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from omni_jax.train import toml
from omni_jax.train.batch import IGNORED, TextBatch
from omni_jax.train.command import Train, train_recipe
from omni_jax.train.data.plan import Packing
from omni_jax.train.loop import train
from omni_jax.train.objective import Step
from omni_jax.train.saving import save_part
from omni_jax.train.settings import Run
from omni_jax.train.sft import Sft
from omni_jax.train.shown import masked_text
from omni_jax.weights.trees import flatten
from scripts.small.objective import ToyBatches, make_objective, recipe_for
from tests.helpers.commands import status_of

NEEDED = ["--model", "m", "--data", "a", "b", "--output", "o"]


def parsed(*flags: str) -> Sft:
    command = _parsed(["train", "sft", *flags])
    assert isinstance(command, Train) and isinstance(command.recipe, Sft)
    return command.recipe


def test_flags_come_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    path, run = tmp_path / "run.toml", Run(model=Path("m"), data=(Path("a"), Path("b")), output=Path("o"), steps=7)
    path.write_text(toml.write(Sft(run=run, train_vision=True)))
    for flag in (["--config", str(path)], [f"--config={path}"]):
        recipe = parsed(*flag, "--steps", "9", "--data", "c")
        assert recipe.train_vision and recipe.run.steps == 9 and recipe.run.data == (Path("c"),)
        assert recipe.run.save_every == Run.save_every and recipe.run.output == Path("o")
    assert parsed(*NEEDED) == Sft(run=Run(model=Path("m"), data=(Path("a"), Path("b")), output=Path("o")))


def test_a_file_may_state_a_part(tmp_path: Path) -> None:
    (tmp_path / "part.toml").write_text("[optimizer]\nlearning_rate = 1e-4\n")
    recipe = parsed("--config", str(tmp_path / "part.toml"), *NEEDED)
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.run.model == Path("m")


def test_exit_statuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("[optimizer]\nlearning_rat = 1\n")
    for status, asked in (
        (2, ["train", "sft", "--model", "m"]),
        (2, ["train", "sft", *NEEDED, "--steps", "many"]),
        (3, ["train", "sft", *NEEDED, "--config", str(tmp_path / "bad.toml")]),
        (3, ["train", "sft", *NEEDED, "--config", str(tmp_path / "none.toml")]),
        (3, ["train", "export", str(tmp_path), "m"]),
        (3, ["train", "plot", str(tmp_path)]),
    ):
        assert status_of(asked) == status, asked
        said = capsys.readouterr()
        assert not said.out and "Traceback" not in said.err
    assert "metrics.csv: there is no such file" in said.err
    train(recipe_for(tmp_path / "run", steps=2), make_objective(), ToyBatches())
    (tmp_path / "run" / "loss.png").unlink()
    assert status_of(["train", "plot", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'loss.png'}\n" and (tmp_path / "run" / "loss.png").exists()


def unread(*_: object) -> Omni:
    raise AssertionError("the weights are read")


def test_settings_and_directories_are_tried_before_the_weights_are_read(
    checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = ["--model", str(checkpoints("tiny")), "--data", "d", "--output", str(tmp_path)]
    (tmp_path / "notes.txt").write_text("")
    for asked, why in (
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "9", "--epochs", "2"], "--epochs is 2; it must be left out where --steps is given"),
        ([], "something else than a run"),
    ):
        with pytest.raises(InputError, match=why):
            train_recipe(parsed(*flags, *asked), unread)


def test_parts_are_trained_by_their_own_flags(omnis: Callable[[str], Omni]) -> None:
    paths = flatten(omnis("tiny").declarations["thinker"].axes)
    groups = {flag: {p for p in paths if parsed(*NEEDED, "--freeze-text", flag).trains(p)}
              for flag in ("--train-vision", "--train-audio", "--train-mergers")}  # fmt: skip
    text = {p for p in paths if parsed(*NEEDED).trains(p)}
    assert sorted([*text, *(p for group in groups.values() for p in group)]) == sorted(paths)
    assert {"embed", "lm_head", "layers/qkv", "norm/weight"} <= text
    assert {"vision/pos_embed", "vision/patch_embed/weight"} <= groups["--train-vision"]
    mergers = {"vision/merger/fc1/weight", "vision/deepstack/fc2/bias", "audio/proj1/weight", "audio/proj2/bias"}
    assert mergers <= groups["--train-mergers"] and "audio/conv_out/weight" in groups["--train-audio"]
    with pytest.raises(InputError, match="nothing is trained"):
        parsed(*NEEDED, "--freeze-text").objective(omnis("tiny"))


def test_a_trained_model_has_all_parts_of_its_source(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    before = omni_jax.load(checkpoints("tiny"))
    changed = before.params["thinker"]["embed"] + 1
    save_part("thinker", checkpoints("tiny"), None, {"embed": changed}, tmp_path / "model")
    after = flatten(omni_jax.load(tmp_path / "model").params)
    assert {path.split("/")[0] for path in after} == {"thinker", "talker", "code2wav"}
    for path, x in flatten(before.params).items():
        np.testing.assert_array_equal(after[path], changed if path == "thinker/embed" else x)


def test_a_batch_is_shown_with_what_is_learned(omnis: Callable[[str], Omni]) -> None:
    tokenizer = omnis("tiny").processor.tokenizer
    one, two = tokenizer.encode("Say it"), tokenizer.encode("No")
    image = tokenizer.token_id("<|image_pad|>")
    ids = np.array([[*one, *[image] * 9, *two, *two, *one, 0, 0]], np.int32)
    second, labels = len(one) + 9 + len(two), np.full(ids.shape, IGNORED, np.int32)
    first_seen = np.arange(ids.shape[1], dtype=np.int32)[None].copy()
    first_seen[0, :second], first_seen[0, second:-2] = 0, second
    labels[0, len(one) + 9 : second] = two
    batch = TextBatch(ids, labels, np.zeros((3, *ids.shape), np.float32), first_seen)
    text = masked_text(Step(batch, ["d:1", "d:7"], 0), tokenizer)
    assert text == "d:1\nSay it<|image_pad|>×9⟦No⟧\n\nd:7\nNoSay it"


def conversations(path: Path) -> Path:
    """Rows that a model can learn by heart, and one that cannot be used."""
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]}
            for i in range(8)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, [*rows, {"messages": "none"}])))
    return path


def test_flags_reach_the_loss_and_the_data(omnis: Callable[[str], Omni], tmp_path: Path) -> None:
    data = conversations(tmp_path / "rows.jsonl")
    asked = ["--model", "m", "--data", str(data), "--output", "o", "--workers", "0", "--max-length", "32"]
    asked += ["--rows", "3"]
    packed: Any = parsed(*asked, "--epochs", "2", "--seed", "5").batches(omnis("tiny"))
    assert packed.plan.packing == Packing(3, 32) and (packed.plan.epochs, packed.plan.seed) == (2, 5)
    alone: Any = parsed(*asked, "--unpacked", "--steps", "4").batches(omnis("tiny"))
    assert alone.plan.packing == Packing(3, 32, several=False) and alone.plan.epochs is None
    with pytest.raises(InputError, match="rows.jsonl:9: 'messages' is of type str"):
        parsed(*asked, "--fatal").batches(omnis("tiny"))
    for flags, dtype, remat in (([], "float32", True), (["--dtype", "bfloat16", "--remat", "none"], "bfloat16", False)):
        objective: Any = parsed(*asked, *flags).objective(omnis("tiny"))
        settings = objective.loss.keywords
        assert (settings["dtype"], settings["remat"]) == (dtype, remat)
        assert {str(x.dtype) for x in jax.tree.leaves(objective.params)} == {"float32"}
        assert {str(x.dtype) for x in jax.tree.leaves(objective.frozen)} == {dtype}


@pytest.mark.slow
def test_fine_tuning_from_data_to_a_model(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = conversations(tmp_path / "rows.jsonl"), tmp_path / "run"
    asked = ["train", "sft", "--model", str(checkpoints("tiny")), "--data", str(data), "--output", str(output)]
    asked += ["--rows", "2", "--max-length", "32", "--workers", "0", "--steps", "12", "--log-every", "4"]
    asked += ["--learning-rate", "3e-3", "--remat", "none"]
    assert status_of([*asked, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "rows.jsonl:9" in said.err and "⟦yes<|im_end|>⟧" in said.out and "parameters frozen" in said.out
    assert not output.exists()
    assert status_of(asked) == 0
    assert str(output / "model") in capsys.readouterr().out
    assert 'dtype = "float32"' in (output / "config.toml").read_text()
    losses = [float(line.split(",")[1]) for line in (output / "metrics.csv").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0] / 2
    before, after = (flatten(omni_jax.load(path).params) for path in (checkpoints("tiny"), output / "model"))
    same = {path for path, x in before.items() if bool(jax.numpy.array_equal(x, after[path]))}
    assert {path for path in before if "/vision/" in path or "/audio/" in path or "thinker" not in path} <= same
    assert "thinker/embed" not in same and "thinker/layers/qkv" not in same
    assert status_of(["train", "export", str(output), str(tmp_path / "best"), "--step", "12"]) == 0
    assert capsys.readouterr().out == f"step 12: {tmp_path / 'best'}\n"
    exported = flatten(omni_jax.load(tmp_path / "best").params)
    assert all(bool(jax.numpy.array_equal(x, exported[path])) for path, x in after.items())
    assert status_of([*asked, "--seed", "1"]) == 3 and "run.seed was 0, is 1" in capsys.readouterr().err
