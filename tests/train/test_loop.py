"""The loop on a small objective: what it learns and writes, and that a stopped run goes on as if it had not stopped."""

import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from omni_jax import process
from omni_jax.errors import InputError
from omni_jax.sharding import make_mesh
from omni_jax.train.export import Export, chosen_step, export
from omni_jax.train.loop import train
from omni_jax.train.objective import Step
from omni_jax.train.plot import read_metrics
from scripts import kills
from scripts.small.objective import ToyBatches, make_objective, recipe_for


def files_of(output: Path) -> dict[str, bytes]:
    """What must not depend on interruptions."""
    return {name: (output / name).read_bytes() for name in kills.COMPARED}


def params_of(output: Path) -> np.ndarray:
    return np.concatenate([np.frombuffer(data, np.float32) for name, data in files_of(output).items() if "/" in name])


def test_the_loss_falls(tmp_path: Path) -> None:
    done = train(recipe_for(tmp_path / "run", steps=60), make_objective(), ToyBatches())
    columns = read_metrics(tmp_path / "run")
    assert [*columns] == ["step", "loss", "far", "gradient_norm", "learning_rate", "tokens", "epoch"]
    assert columns["step"] == [2.0 * i for i in range(1, 31)] and columns["epoch"][-1] == 10
    assert columns["loss"][-1] < columns["loss"][0] / 3 and done.loss == pytest.approx(columns["loss"][-1])
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    held = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert held[-2:] == [55, 60] and done.best_step in held and len(held) <= 3


def test_a_row_is_the_mean_over_the_steps_since_the_last(tmp_path: Path) -> None:
    for every in (1, 5):
        train(recipe_for(tmp_path / str(every), log_every=every), make_objective(), ToyBatches())
    each, few = (read_metrics(tmp_path / str(every)) for every in (1, 5))
    tokens = np.diff(each["tokens"], prepend=0)
    spans = [slice(0, 5), slice(5, 10), slice(10, 12)]
    for name in ("loss", "far"):
        means = [np.average(each[name][span], weights=tokens[span]) for span in spans]
        assert few[name] == pytest.approx(means)
    for name in each.keys() - {"loss", "far"}:
        assert few[name] == [each[name][span][-1] for span in spans]


def test_the_best_checkpoint_is_that_of_the_lowest_loss_since_the_one_before(tmp_path: Path) -> None:
    far = {0: 100, 1: 100, 4: 30, 5: 30}
    broken = {i: {"target": ToyBatches().step(i).batch["target"] + off} for i, off in far.items()}
    settings = recipe_for(tmp_path / "run", steps=6, save_every=2)
    settings = replace(settings, run=replace(settings.run, keep=1))
    assert train(settings, make_objective(), ToyBatches(broken=broken)).best_step == 4
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "6"]


def test_steps_follow_from_epochs(tmp_path: Path) -> None:
    done = train(
        recipe_for(tmp_path / "run", steps=None, accumulation=4), make_objective(), ToyBatches(count=3, epochs=2)
    )
    assert done.steps == 2 and read_metrics(tmp_path / "run")["epoch"] == [2.0]


def test_data_that_end_early_end_the_run(tmp_path: Path) -> None:
    """Batches may be left out while they are prepared; what is there is trained on and kept."""
    output = tmp_path / "run"
    for _ in range(2):
        done = train(recipe_for(output, steps=9), make_objective(), ToyBatches(count=3, epochs=2))
        assert done.steps == 6 and read_metrics(output)["step"] == [2, 4, 6] and (output / "model").is_dir()


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    small, large = ToyBatches(rows=4), ToyBatches(rows=8)
    halves = [small.step(i).batch for i in range(4)]
    for i in range(2):
        pairs = zip(halves[2 * i].items(), halves[2 * i + 1].values(), strict=True)
        large.broken[i] = {name: np.concatenate([one, other]) for (name, one), other in pairs}
    train(recipe_for(tmp_path / "small", steps=2, accumulation=2), make_objective(), small)
    train(recipe_for(tmp_path / "large", steps=2), make_objective(), large)
    np.testing.assert_allclose(params_of(tmp_path / "small"), params_of(tmp_path / "large"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "expert": 2}, {"tensor": 8}])
def test_eight_devices_are_one(sizes: dict[str, int], tmp_path: Path) -> None:
    train(recipe_for(tmp_path / "one", steps=4), make_objective(), ToyBatches())
    mesh = make_mesh(jax.devices(), **sizes)
    train(recipe_for(tmp_path / "mesh", steps=4), make_objective(), ToyBatches(), mesh)
    np.testing.assert_allclose(params_of(tmp_path / "mesh"), params_of(tmp_path / "one"), rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_on_another_mesh(tmp_path: Path) -> None:
    train(recipe_for(tmp_path / "one", steps=4), make_objective(), ToyBatches())
    stop_after(3, tmp_path / "run")
    mesh = make_mesh(jax.devices(), fsdp=2, tensor=2, expert=2)
    train(recipe_for(tmp_path / "run", steps=4), make_objective(), ToyBatches(), mesh)
    np.testing.assert_allclose(params_of(tmp_path / "run"), params_of(tmp_path / "one"), rtol=1e-5, atol=1e-5)


def test_any_checkpoint_is_exported(tmp_path: Path) -> None:
    """What is written is what the run had at that step, also where it could not go on."""
    output = tmp_path / "run"
    settings = recipe_for(output, steps=12, save_every=2)
    broken = ToyBatches(broken={7: {"target": np.full((8, 4), np.nan, np.float32)}})
    with pytest.raises(InputError, match="the checkpoint of step 6 is kept"):
        train(settings, make_objective(), broken)
    for asked, step in ((None, 6), (4, 4)):
        where = tmp_path / f"model{step}"
        assert chosen_step(settings, Export(output, where, asked)) == step
        mesh = make_mesh(jax.devices(), fsdp=2, expert=4) if step == 4 else None
        export(settings, step, make_objective(), mesh, where)
        ended = train(recipe_for(tmp_path / str(step), steps=12, save_every=step), make_objective(), Ended(step))
        for name in ("table", "experts", "norm.weight"):
            assert (where / name).read_bytes() == (ended.model / name).read_bytes()
    for where, asked, why in ((tmp_path / "m", 5, "no checkpoint of step 5; there are: 4, 6"), (output, 4, "exists")):
        with pytest.raises(InputError, match=why):
            chosen_step(settings, Export(output, where, asked))


class Ended(ToyBatches):
    """The first batches, as if the others had become unusable."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def __iter__(self) -> Iterator[Step]:
        return islice(super().__iter__(), self.most)


def test_metrics_for_tensorboard(tmp_path: Path) -> None:
    """Each file begins with the step from which it hides what earlier ones have."""
    for output in (tmp_path / "run", tmp_path / "run"):
        train(recipe_for(output, steps=4), make_objective(), ToyBatches())
    files = sorted((tmp_path / "run" / "tensorboard").iterdir(), key=lambda path: path.suffix)
    protocol: Any = event_pb2
    first, second = ([protocol.Event.FromString(record) for record in records_of(path)] for path in files)
    assert [event.step for event in first] == [0, 1, 2, 4] and [event.step for event in second] == [0, 5]
    assert first[1].session_log.status == protocol.SessionLog.START == second[1].session_log.status
    columns = read_metrics(tmp_path / "run")
    for i, event in enumerate(first[2:]):
        told = {value.tag: value.simple_value for value in event.summary.value}
        assert told.pop("seconds") > 0 < told.pop("tokens_per_second")
        assert told == pytest.approx({name: columns[name][i] for name in columns if name in told}) and len(told) == 4


def records_of(path: Path) -> list[bytes]:
    """The records of a file of TensorBoard: length, its check, data, their check."""
    data, records = path.read_bytes(), []
    while data:
        end = 12 + struct.unpack_from("Q", data)[0]
        records.append(data[12:end])
        data = data[end + 4 :]
    return records


def stop_after(steps: int, output: Path) -> None:
    """A run of 4 steps that saves each and ends with an error in the data after some."""

    class Ending(ToyBatches):
        def step(self, number: int):
            if number >= steps:
                raise ConnectionError("gone")
            return super().step(number)

    with pytest.raises(ConnectionError):
        train(recipe_for(output, steps=4, save_every=1, log_every=3), make_objective(), Ending())


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    train(recipe_for(tmp_path / "whole", steps=4, save_every=1, log_every=3), make_objective(), ToyBatches())
    output = tmp_path / "run"
    stop_after(3, output)
    # What a run leaves that is killed while it writes: rows behind the checkpoint, and an unfinished checkpoint.
    latest = max(int(path.name) for path in (output / "checkpoints").iterdir())
    with (output / "metrics.csv").open("a") as file:
        file.write("9,1,1,1,1,1,1\n10,")
    (output / "checkpoints" / f"{latest + 1}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    settings = recipe_for(output, steps=4, save_every=2, log_every=3)
    assert train(settings, make_objective(), ToyBatches()).steps == 4
    assert files_of(output) == files_of(tmp_path / "whole")
    assert not [*(output / "checkpoints").glob("*tmp*")]
    before = (output / "model" / "table").stat().st_mtime_ns
    assert train(settings, make_objective(), ToyBatches()).steps == 4
    assert (output / "model" / "table").stat().st_mtime_ns == before and files_of(output) == files_of(
        tmp_path / "whole"
    )


@pytest.mark.parametrize("interrupted", [True, False])
def test_data_that_fail_cost_no_step(interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out in a worker, or a scheduler ends all processes of a command at once."""

    class Failing(ToyBatches):
        def step(self, number: int) -> Step:
            if number == 3:
                monkeypatch.setattr(process, "interrupted", lambda: interrupted)
                raise InputError("a process that prepares data was killed")
            return super().step(number)

    settings = {"steps": 6, "save_every": 9, "log_every": 2}
    with pytest.raises(KeyboardInterrupt if interrupted else InputError):
        train(recipe_for(tmp_path / "run", **settings), make_objective(), Failing())
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    for output in (tmp_path / "run", tmp_path / "whole"):
        train(recipe_for(output, **settings), make_objective(), ToyBatches())
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


# A command that waits at each step until it is told to go on, and says which step it is.
COMMAND = """
import sys
from pathlib import Path
from omni_jax import process
def main():
    from omni_jax.train.loop import train
    from scripts.small.objective import ToyBatches, make_objective, recipe_for
    process.end_on_terminate()
    class Told(ToyBatches):
        def step(self, number):
            print(number, flush=True)
            sys.stdin.readline()
            return super().step(number)
    train(recipe_for(Path(sys.argv[1]), steps=9, save_every=7, log_every=3), make_objective(), Told())
process.enter("toy", "__main__")
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_ends(sent: signal.Signals, tmp_path: Path) -> None:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path / "run")], text=True, **pipes) as command:
        assert command.stdin and command.stdout
        for number in range(4):
            assert command.stdout.readline() == f"{number}\n"
            if number == 3:
                command.send_signal(sent)
            command.stdin.write("\n")
            command.stdin.flush()
        _, err = command.communicate("\n" * 20, timeout=120)
    assert command.returncode == 130 and "a checkpoint is saved first" in err and "Traceback" not in err
    (held,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(held.name) in (3, 4)
    train(recipe_for(tmp_path / "run", steps=9, save_every=7, log_every=3), make_objective(), ToyBatches())
    train(recipe_for(tmp_path / "whole", steps=9, save_every=7, log_every=3), make_objective(), ToyBatches())
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_as_if_it_was_not() -> None:
    with pytest.raises(SystemExit) as ended:
        kills.main(times=2)
    assert ended.value.code == 0
