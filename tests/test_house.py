"""The rules of the house, checked on the source: floors, light imports, sizes, docstrings, nothing unfinished."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Modules and packages of omni_jax, and `convert`, from the bottom to the top: each imports lower floors only. A new one
# gets the lowest floor above everything that it imports. CONTRIBUTING shows the same table.
FLOORS = (
    ("errors", "process"),
    ("compilation_cache", "distributed", "files", "quantization", "reader", "sharding"),
    ("decoder_config", "sound"),
    ("config", "draft_config"),
    ("inputs", "ops"),
    ("models", "rows", "settings"),
    ("flags", "weights"),
    ("decode",),
    ("omni",),
    ("loading", "printing"),
    ("ask", "evaluate", "inspection", "serve", "train"),
    ("cli",),
    ("convert",),
)
# Modules without a floor: the public names, and the entry of the command.
ENTRIES = ("omni_jax", "omni_jax.__main__")
# Slow or optional to import: only inside the functions that need them.
HEAVY = {
    *("av", "grain", "huggingface_hub", "jinja2", "jiwer", "librosa", "matplotlib", "optax", "orbax", "PIL", "pyarrow"),
    *("prometheus_client", "safetensors", "scipy", "soundfile", "tensorboardX", "tokamax", "tokenizers"),
    "uvicorn",
}
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax"}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError|pragma: no cover")


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _place(module: str) -> str | None:
    """The module or package of `FLOORS` that a module belongs to; None for what is not ours, and for `ENTRIES`."""
    top, _, rest = module.partition(".")
    return top if top == "convert" else rest.partition(".")[0] or None if top == "omni_jax" else None


def _floor(module: str) -> int | None:
    return next((i for i, names in enumerate(FLOORS) if _place(module) in names), None)


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, `from a import b` as a.b too because b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _runs_at_import(tree: ast.Module) -> ast.Module:
    """The tree without the bodies of functions and without what only type checkers read."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


PACKAGE = _sources("omni_jax")
SOURCE = _sources("omni_jax", "convert", "scripts")
by_module = pytest.mark.parametrize("path", PACKAGE, ids=_name)
by_floor = pytest.mark.parametrize("path", _sources("omni_jax", "convert"), ids=_name)
by_source = pytest.mark.parametrize("path", SOURCE, ids=_name)


def _in_project(name: str, modules: dict[str, Path]) -> str | None:
    """The module of the project that an imported name is, or is defined in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


@by_floor
def test_every_module_has_a_floor(path):
    assert _name(path) in ENTRIES or _floor(_name(path)) is not None


@by_floor
def test_imports_point_down(path):
    here, place = _floor(_name(path)), _place(_name(path))
    assert not [name for name in _imports(_tree(path)) if name.partition(".")[0] in ("scripts", "tests")]
    if here is not None:
        floors = {name: _floor(name) for name in _imports(_tree(path)) if _place(name) != place}
        assert not [name for name, floor in floors.items() if floor is not None and floor >= here]


def test_imports_have_no_circles():
    modules = {_name(path): path for path in SOURCE if _name(path) not in ENTRIES}
    found = {a: {_in_project(n, modules) for n in _imports(_tree(path))} - {a, None} for a, path in modules.items()}
    while free := [name for name, targets in found.items() if not targets & found.keys()]:
        for name in free:
            del found[name]
    assert not found  # each of these is on a circle, or imports one that is


def test_contributing_shows_the_floors():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    shown = {int(floor): tuple(re.findall(r"`(\w+)`", names)) for floor, names in rows}
    assert shown == dict(enumerate(FLOORS))


@by_module
def test_heavy_libraries_are_imported_where_they_are_used(path):
    heavy = {name.split(".")[0] for name in _imports(_runs_at_import(_tree(path)))} & HEAVY
    assert not heavy


@pytest.mark.parametrize("path", _sources("omni_jax/inputs"), ids=_name)
def test_inputs_never_import_jax(path):
    assert not {name.split(".")[0] for name in _imports(_tree(path))} & DEVICE


def test_inputs_load_without_jax():
    modules = [_name(path) for path in _sources("omni_jax/inputs")]
    code = f"import sys, {', '.join(modules)}; sys.exit(' '.join({DEVICE!r} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_thinker_and_talker_do_not_know_each_other():
    for one, other in (("thinker", "talker"), ("talker", "thinker")):
        path = ROOT / "omni_jax" / "models" / f"{one}.py"
        if path.exists():
            assert f"omni_jax.models.{other}" not in set(_imports(_tree(path)))


@by_source
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 400
    functions = [n for n in ast.walk(_tree(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [f"{n.name}: {n.end_lineno}-{n.lineno}" for n in functions if (n.end_lineno or 0) - n.lineno >= 50]


@by_source
def test_public_names_are_documented(path):
    tree = _tree(path)
    assert not tree.body or ast.get_docstring(tree)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert not [n.name for n in public if not ast.get_docstring(n)]


@by_source
def test_nothing_is_unfinished(path):
    assert not UNFINISHED.findall(path.read_text())
    functions = [n for n in ast.walk(_tree(path)) if isinstance(n, ast.FunctionDef)]
    assert not [n.name for n in functions if n.args.kwarg and n.args.kwarg.arg == "kwargs"]


def test_version_is_stated_once():
    import omni_jax

    assert re.fullmatch(r"\d+\.\d+\.\d+", omni_jax.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_data_files_have_a_licence(data_dir):
    licences = (data_dir / "LICENSES.md").read_text()
    assert not [path.name for path in data_dir.iterdir() if path.name not in licences and path.name != "LICENSES.md"]
