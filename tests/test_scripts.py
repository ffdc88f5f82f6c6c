"""The rules of the scripts and figures of the source that must hold: imports, sizes, every command's help."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import house

FOUND = house.modules()
SOURCE = [module for module in FOUND.values() if module.package != "tests"]
# Run as a file by the benchmark.
SERVED = "scripts.bench.serve"
COMMANDS = [
    name.removesuffix(".__main__")
    for name, module in FOUND.items()
    if module.package == "scripts" and name != SERVED and 'if __name__ == "__main__":' in module.lines
]


def test_no_import_goes_in_a_circle_or_up() -> None:
    assert house.circles(FOUND) == []
    assert house.upward(FOUND, house.floors()) == []


def test_tests_import_no_tests() -> None:
    tests = {name for name in FOUND if name.rpartition(".")[2].startswith("test_")}
    assert not [f"{name} -> {other}" for name in tests for other in FOUND[name].imports & tests]


def test_files_and_functions_are_short() -> None:
    assert not [module.name for module in SOURCE if len(module.lines) > 400]
    sizes = [function.lines for module in SOURCE for function in module.functions]
    assert house.ninetieth(sizes) <= 30 and max(sizes) <= 60


def test_docstrings_of_scripts_state_shapes() -> None:
    functions = [f for module in SOURCE if module.package == "scripts" for f in module.functions]
    assert not [f.name for f in functions if f.public and f.has_arrays and not f.has_shapes]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", command, "--help"], cwd=house.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: python -m {command}" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["text", "speech", "drafting", "drafters", "loading", "scaling"])
def test_every_measurement_explains_its_options(command: str) -> None:
    arguments = ["-m", "scripts.bench", command, "--help"]
    done = subprocess.run([sys.executable, *arguments], cwd=house.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--json" in done.stdout and "--options" not in done.stdout, done.stderr


def test_a_wrong_option_gives_one_line() -> None:
    arguments = ["-m", "scripts.bench", "text", "--new", "1"]
    done = subprocess.run([sys.executable, *arguments], cwd=house.ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "new is 1; give at least 2" in done.stderr and "Traceback" not in done.stderr


def test_a_tokenizer_is_written_in_both_layouts(tmp_path: Path) -> None:
    arguments = ["-m", "scripts.small", "tokenizer", "--variant", "small"]
    for folder, more, file in (("own", [], "tokenizer.json"), ("public", ["--public"], "vocab.json")):
        command = [sys.executable, *arguments, str(tmp_path / folder), *more]
        subprocess.run(command, cwd=house.ROOT, check=True, capture_output=True)
        assert (tmp_path / folder / file).is_file()
    assert not (tmp_path / "public" / "tokenizer.json").exists()


def project(folder: Path, **sources: str) -> dict[str, house.Module]:
    """A project of files: "package__module" and its text."""
    for name, source in sources.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return house.modules(folder)


def test_a_circle_is_found_even_inside_functions(tmp_path: Path) -> None:
    found = project(
        tmp_path,
        omni_jax__a="from omni_jax import b",
        omni_jax__b="import omni_jax.c",
        omni_jax__c="def f():\n    from omni_jax.a import x",
        omni_jax__d="import omni_jax.a",
    )
    assert house.circles(found) == [["omni_jax.a", "omni_jax.b", "omni_jax.c"]]


def test_imports_of_what_lies_above_are_found(tmp_path: Path) -> None:
    found = project(
        tmp_path,
        omni_jax__low="import omni_jax.high, scripts.tool",
        omni_jax__high="import omni_jax.low, convert.load",
        convert__load="import omni_jax.high",
        scripts__tool="import tests.helper, convert.load",
        tests__helper="import scripts.tool",
    )
    assert house.upward(found, {"low": 0, "high": 1}) == [
        "omni_jax.low -> omni_jax.high",
        "omni_jax.low -> scripts.tool",
        "scripts.tool -> tests.helper",
    ]


def test_places_that_share_lines_are_found_once(tmp_path: Path) -> None:
    lines = [f"x{i} = {i}" for i in range(8)]
    indented = "\n    # why\n\n    ".join(["if lines:", *lines])
    found = project(
        tmp_path,
        omni_jax__a="\n".join(["import os", *lines]),
        omni_jax__b=indented,
        omni_jax__c="\n".join(lines[:5]),
    )
    assert house.alike(found) == [("omni_jax.a:2", "omni_jax.b:4")]


def test_functions_are_measured(tmp_path: Path) -> None:
    source = '''
class A:
    def f(self, x: "jax.Array", *, n: int) -> None:
        """x [B, T]."""

        def g(y: Array): ...

def _h() -> np.ndarray:
    """An array."""
'''
    f, g, h = project(tmp_path, omni_jax__a=source)["omni_jax.a"].functions
    assert (f.name, f.lines, f.parameters, f.public) == ("omni_jax.a.A.f", 4, 2, True)
    assert f.has_arrays and f.has_shapes and not g.public and not h.public and h.has_arrays and not h.has_shapes
    assert house.ninetieth(list(range(1, 11))) == 9 and house.ninetieth([5]) == 5
