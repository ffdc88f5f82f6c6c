"""The name nano, and those of its drafters, wherever a model or a drafter is named."""

from pathlib import Path

import pytest

import omni_jax as oj
from convert import load_hf
from omni_jax.cli import main
from omni_jax.errors import CheckpointError
from omni_jax.weights import locate as places
from omni_jax.weights.locate import locate

NAMES = ("nano", "nano/dflash", "nano/eagle3")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's model, of empty configurations, in a folder that is not the current one."""
    for name in NAMES:
        (tmp_path / "package" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name / "config.json").write_text("{}")
    monkeypatch.setattr(places, "NANO", tmp_path / "package" / "nano")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "package"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_directory_of_the_package(package: Path, name: str) -> None:
    assert locate(name) == locate(Path(f"{name}/")) == package / name


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_here_comes_first(package: Path, name: str) -> None:
    Path(name).mkdir(parents=True)
    assert locate(name) == Path(name)


def test_a_file_here_is_not_passed_over(package: Path) -> None:
    Path("nano").write_text("")
    with pytest.raises(CheckpointError, match=r"^nano: not a directory"):
        locate("nano")


def test_what_the_installation_lacks_is_said(package: Path, capsys: pytest.CaptureFixture) -> None:
    for name in NAMES:
        (package / name / "config.json").unlink()
    lacks = "{}: no such directory here, and this installation lacks it .*; install omni_jax again"
    for load, name in ((oj.load, "nano"), (load_hf, "nano"), (oj.load_drafter, "nano/dflash")):
        with pytest.raises(CheckpointError, match=lacks.format(name)):
            load(name)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "--model", "nano"])
    assert stopped.value.code == 3 and "install omni_jax again" in capsys.readouterr().err


def test_other_names_of_that_kind_are_model_ids(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_snapshot", Path)
    assert locate("nano/other") == Path("nano/other")
    with pytest.raises(CheckpointError, match="no such directory$"):
        locate("nano2")
