"""What a run refuses, with one sentence, and that nothing is lost by it."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.errors import CheckpointError, InputError
from omni_jax.train.checkpoints import _reason as reason
from omni_jax.train.checkpoints import open_checkpoints
from omni_jax.train.loop import train
from omni_jax.train.settings import Optimizer, Run
from scripts.small.objective import Toy, ToyBatches, make_objective, recipe_for
from tests.helpers.commands import OPAQUE


def refused(recipe: Toy, batches: ToyBatches, kind: type[Exception] = InputError) -> str:
    with pytest.raises(kind) as raised:
        train(recipe, make_objective(), batches)
    assert not OPAQUE.search(str(raised.value))
    return str(raised.value)


def steps_held(output: Path) -> list[int]:
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdigit())


def test_data_without_a_batch(tmp_path: Path) -> None:
    assert "d: no row can be trained on" in refused(recipe_for(tmp_path / "run"), ToyBatches(count=0))
    assert not (tmp_path / "run").exists()


MASKED = {"mask": np.zeros((8, 4), bool)}
NAN = {"target": np.full((8, 4), np.nan, np.float32)}


@pytest.mark.parametrize("broken, why", [(MASKED, "no token is to be learned"), (NAN, "the loss is nan")])
def test_a_step_that_cannot_be_taken(broken: dict[str, Any], why: str, tmp_path: Path) -> None:
    """The step and its rows are named, the last checkpoint is kept, and the run goes on once the row is mended."""
    settings = recipe_for(tmp_path / "run", steps=8, save_every=3, log_every=4)
    said = refused(settings, ToyBatches(broken={4: broken}))
    assert f"step 5: {why}" in said and "in d:5" in said and "the checkpoint of step 3 is kept" in said
    assert steps_held(tmp_path / "run") == [3]
    train(settings, make_objective(), ToyBatches())
    train(recipe_for(tmp_path / "whole", steps=8, save_every=3, log_every=4), make_objective(), ToyBatches())
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_a_gradient_that_is_not_finite(tmp_path: Path) -> None:
    one = np.zeros((8, 4), bool)
    one[0, 0] = True
    huge = ToyBatches(broken={0: {"target": np.full((8, 4), 1.8e19, np.float32), "mask": one}})
    said = refused(recipe_for(tmp_path / "run"), huge)
    assert "norm of the gradient is inf" in said and "there is no checkpoint yet" in said


def test_of_many_rows_some_are_named(tmp_path: Path) -> None:
    said = refused(recipe_for(tmp_path / "run", accumulation=12), ToyBatches(broken={0: NAN}))
    assert "in d:1, d:2" in said and "d:8 and 4 more" in said


def test_one_masked_batch_of_a_step_is_fine(tmp_path: Path) -> None:
    train(recipe_for(tmp_path / "run", steps=2, accumulation=2), make_objective(), ToyBatches(broken={0: MASKED}))


def test_another_configuration(tmp_path: Path) -> None:
    train(recipe_for(tmp_path / "run", steps=2), make_objective(), ToyBatches())
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    said = refused(recipe_for(tmp_path / "run", steps=3, clip_norm=2.0), ToyBatches())
    assert "run.steps was 2, is 3" in said and "optimizer.clip_norm was 1.0, is 2.0" in said
    assert "save_every" not in said and (tmp_path / "run" / "metrics.csv").read_bytes() == before
    # Where files go and how often they are written may change.
    (tmp_path / "run").rename(tmp_path / "moved")
    train(recipe_for(tmp_path / "moved", steps=2, save_every=1, log_every=1), make_objective(), ToyBatches())


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "holds something else than a run" in refused(recipe_for(tmp_path / "run"), ToyBatches())
    (tmp_path / "file").write_text("")
    assert "cannot be" in refused(recipe_for(tmp_path / "file"), ToyBatches())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_directory_in_use(tmp_path: Path) -> None:
    output, said = tmp_path / "run", []

    class Again(ToyBatches):
        def step(self, number: int) -> Any:
            if not said:
                said.append(refused(recipe_for(output, steps=2), ToyBatches()))
            return super().step(number)

    train(recipe_for(output, steps=2), make_objective(), Again())
    assert "is being written by another run" in said[0]


# A run whose files may not grow beyond some bytes once it has a checkpoint, as on a full disk.
FULL = """
import resource, sys, time
from pathlib import Path
from omni_jax.errors import OmniError
from omni_jax.train.loop import train
from scripts.small.objective import ToyBatches, make_objective, recipe_for
class Filling(ToyBatches):
    def step(self, number):
        if number == 5:
            while sys.argv[3] == "3" and not (Path(sys.argv[1]) / "checkpoints" / "3").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        return super().step(number)
settings = recipe_for(Path(sys.argv[1]), steps=12, save_every=int(sys.argv[3]), log_every=1)
try:
    train(settings, make_objective(64), Filling())
except OmniError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    "size, every, why",
    [
        (4_000, 3, "a checkpoint cannot be written (file too large); those of steps [3] are complete: make room"),
        (900, 9, "tensorboard cannot be written (file too large); the checkpoints are safe: make room"),
    ],
)
def test_a_full_disk(size: int, every: int, why: str, tmp_path: Path) -> None:
    asked = [sys.executable, "-c", FULL, str(tmp_path / "run"), str(size), str(every)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1 and why in done.stderr.splitlines()[-1], done.stderr
    assert not OPAQUE.search(done.stderr)
    settings = {"steps": 12, "save_every": every, "log_every": 1}
    train(recipe_for(tmp_path / "run", **settings), make_objective(64), ToyBatches())
    train(recipe_for(tmp_path / "whole", **settings), make_objective(64), ToyBatches())
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_only_orbax_leaves_errors_that_nobody_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """asyncio reports a future that failed when it is collected, which may be after the run has ended."""
    with open_checkpoints(tmp_path, keep=1):
        pass
    for place in ("/lib/orbax/checkpoint/writing.py", "/lib/mine.py"):
        try:
            exec(compile("raise ValueError", place, "exec"))
        except ValueError:
            logging.getLogger("asyncio").error("exception was never retrieved", exc_info=True)
    assert len(caplog.records) == 1 and "mine.py" in caplog.text


@pytest.mark.parametrize("said", ["to file 3: File too large ", "File too large [tensorstore_spec='{\"a\":[[64]]}'] "])
def test_the_words_of_the_system(said: str) -> None:
    """TensorStore puts a description of the array before or after the number of the system's error."""
    error = ValueError(f"OUT_OF_RANGE: Error opening \"zarr\" driver: {'x' * 200}: {said}[os_error_code='27']")
    assert reason(error) == "file too large"


def test_a_checkpoint_that_is_damaged(tmp_path: Path) -> None:
    train(recipe_for(tmp_path / "run", steps=6, save_every=3), make_objective(), ToyBatches())
    latest = tmp_path / "run" / "checkpoints" / "6"
    for file in latest.rglob("*"):
        if file.is_file() and "ocdbt" in str(file):
            file.write_bytes(b"")
    said = refused(recipe_for(tmp_path / "run", steps=6, save_every=3), ToyBatches(), CheckpointError)
    assert str(latest) in said and "remove it" in said


@pytest.mark.parametrize(
    "group, name, value",
    [
        *((Run, name, 0) for name in ("steps", "save_every", "keep", "log_every")),
        *((Run, name, value) for name, value in (("epochs", 0), ("epochs", 2), ("seed", -1), ("data", ()))),
        *((Optimizer, name, 0.0) for name in ("learning_rate", "clip_norm")),
        *((Optimizer, name, 1.5) for name in ("warmup_ratio", "final_ratio", "beta1", "beta2")),
        *((Optimizer, name, -1.0) for name in ("weight_decay", "learning_rate")),
        (Optimizer, "accumulation", 0),
    ],
)
def test_settings_that_cannot_be(group: type, name: str, value: Any, tmp_path: Path) -> None:
    settings = recipe_for(tmp_path / "run")
    part = {Run: settings.run, Optimizer: settings.optimizer}[group]
    object.__setattr__(part, name, value)
    flag = f"--{name.replace('_', '-')} is "
    assert refused(settings, ToyBatches()).startswith(flag) and not (tmp_path / "run").exists()
