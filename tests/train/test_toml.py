"""Configurations as TOML: what is written is read back, and what is wrong is named."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import tyro
from tyro.conf import OmitArgPrefixes

from omni_jax.errors import InputError
from omni_jax.train import toml
from omni_jax.train.settings import Compute, Optimizer, changed, values_of
from scripts.small.objective import Toy, recipe_for


@dataclass(frozen=True, kw_only=True)
class Fast(Toy):
    """A recipe with a learning rate of its own."""

    optimizer: OmitArgPrefixes[Optimizer] = field(default_factory=lambda: Optimizer(learning_rate=0.5))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    settings = recipe_for(Path('a "quoted"\\ path\n\x7f é'), learning_rate=1e-05)
    run = replace(settings.run, data=(Path("a"), Path("b c")), steps=None, epochs=2)
    settings = replace(settings, run=run, compute=Compute(mesh="data=2", remat="none"), width=3)
    path = written(tmp_path, toml.write(settings))
    assert toml.read(Toy, path) == settings and not changed(toml.read(Toy, path), settings)
    assert len(values_of(settings)) > 20 and "call.dry_run" not in values_of(settings)


def test_what_is_not_stated_keeps_the_recipes_default(tmp_path: Path) -> None:
    text = '[run]\nmodel = "m"\ndata = ["d"]\noutput = "o"\n[optimizer]\nclip_norm = 2\n'
    read = toml.read(Fast, written(tmp_path, text))
    assert read.optimizer == Optimizer(learning_rate=0.5, clip_norm=2.0) and type(read.optimizer.clip_norm) is float
    assert read.run.save_every == 500
    partial = toml.read(Fast, written(tmp_path, '[run]\nmodel = "m"\n'), absent=tyro.MISSING)
    assert partial.run.output is tyro.MISSING and partial.run.model == Path("m")


@pytest.mark.parametrize(
    "text, why",
    [
        ("[optimizer]\nbeta3 = 1\n", r"optimizer\.beta3: there is no such setting; did you mean beta[12]\?"),
        ("quux = 1\n", "quux: there is no such setting; there are run, optimizer, batch, compute, width"),
        ("[call]\ndry_run = true\n", "call: there is no such setting"),
        ('[optimizer]\nlearning_rate = "fast"\n', "optimizer.learning_rate is 'fast'; it must be a number"),
        ("[run]\nsteps = 1.5\n", "run.steps is 1.5; it must be a whole number"),
        ("[run]\nsteps = true\n", "run.steps is True; it must be a whole number"),
        ("[run]\ndata = 'x'\n", "run.data is 'x'; it must be a list, each a path as a text"),
        ("[run]\ndata = [1]\n", "run.data is 1; it must be a path as a text"),
        ("[compute]\ndtype = 'int8'\n", "compute.dtype is 'int8'; it must be 'float32' or 'bfloat16'"),
        ("[batch]\nfatal = 1\n", "batch.fatal is 1; it must be true or false"),
        ("optimizer = 1\n", r"optimizer is 1; it must be a table, \[optimizer\]"),
        ("[run]\nmodel = 'm'\n", "run.data is not stated"),
        ("recipe = 'lora'\n", "is for the recipe 'lora', not 'toy'"),
        ("steps = \n", "no valid TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why) as raised:
        toml.read(Toy, written(tmp_path, text))
    assert str(raised.value).startswith(str(tmp_path / "run.toml"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        toml.read(Toy, tmp_path / "none.toml")
