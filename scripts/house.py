"""Print figures of the source itself: sizes, docstrings, imports, repetitions.

    python -m scripts.house            # the figures
    python -m scripts.house --places   # and the places that miss the goals

Files and functions are measured in lines, docstrings and comments included. A docstring has shapes if it has brackets
such as [B, T, D]; it needs them if an argument or the result is an array. Imports inside functions count as all others.
Two places are alike if six successive lines are equal; indentation, empty lines, comments and imports are left out.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import tyro

ROOT = Path(__file__).resolve().parent.parent
# From the lowest floor up: no package may import a later one, but for commands of omni_jax that run those of convert.
# It holds the public names, and imports them at their first use.
PUBLIC = "omni_jax"
PACKAGES = ("omni_jax", "convert", "scripts", "tests")
MAX_PARAMETERS, ALIKE_LINES = 12, 6


@dataclass(frozen=True)
class Function:
    """A function or method, by its dotted name, and whether it is part of a public interface."""

    name: str
    node: ast.FunctionDef
    public: bool

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def parameters(self) -> int:
        arguments = self.node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return len([argument for argument in named if argument.arg not in ("self", "cls")])

    @property
    def has_arrays(self) -> bool:
        """Whether an annotation of the signature names an array type."""
        arguments = [argument for argument in ast.walk(self.node.args) if isinstance(argument, ast.arg)]
        annotations = [argument.annotation for argument in arguments] + [self.node.returns]
        written = " ".join(ast.unparse(annotation) for annotation in annotations if annotation)
        return "Array" in written or "ndarray" in written

    @property
    def has_shapes(self) -> bool:
        text = ast.get_docstring(self.node) or ""
        return "[" in text and "]" in text


@dataclass(frozen=True)
class Module:
    """A source file."""

    name: str
    path: Path

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text("utf-8").splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse("\n".join(self.lines))

    @cached_property
    def functions(self) -> list[Function]:
        return list(_functions(self.tree, self.name, public=True))

    @cached_property
    def imports(self) -> set[str]:
        """Every name that is imported, `from a import b` as a.b too because b may be a module."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        return names

    @property
    def package(self) -> str:
        return self.name.split(".")[0]


def _functions(tree: ast.AST, prefix: str, public: bool) -> Iterator[Function]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name, shown = f"{prefix}.{node.name}", public and not node.name.startswith("_")
            if isinstance(node, ast.FunctionDef):
                yield Function(name, node, shown)
                shown = False
            yield from _functions(node, name, shown)
        else:
            yield from _functions(node, prefix, public)


def modules(root: Path = ROOT) -> dict[str, Module]:
    """All modules of the project by name."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = Module(name, path)
    return found


def circles(found: dict[str, Module]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    found = {name: module for name, module in found.items() if name != PUBLIC}
    reach = {name: (module.imports & found.keys()) - {name} for name, module in found.items()}
    # A package is imported before what it holds; that alone makes no circle.
    reached = {name: _reached(name, reach) for name in found}
    groups = {frozenset(o for o in reached[name] if name in reached[o]) for name in found if name in reached[name]}
    return sorted(sorted(group) for group in groups)


def _reached(start: str, reach: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    queue = list(reach[start])
    while queue:
        if (name := queue.pop()) not in seen:
            seen.add(name)
            queue += reach[name]
    return seen


def floors(root: Path = ROOT) -> dict[str, int]:
    """The floor of each module of omni_jax, as tests/test_house.py states them, lowest first."""
    for node in ast.parse((root / "tests" / "test_house.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS":
            return {name: i for i, names in enumerate(ast.literal_eval(node.value)) for name in names}
    raise ValueError("tests/test_house.py states no FLOORS")


def upward(found: dict[str, Module], of: dict[str, int]) -> list[str]:
    """Imports of a module on a higher floor, or of a later package."""

    def floor(name: str) -> int:
        parts = name.split(".")[1:]
        known = (of[".".join(parts[:n])] for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in of)
        return next(known, len(of)) if name.startswith("omni_jax.") else 0

    wrong = []
    for module in (module for name, module in found.items() if name != PUBLIC):
        for other in sorted(module.imports & found.keys()):
            here, there = PACKAGES.index(module.package), PACKAGES.index(found[other].package)
            beside = here == there and module.name in found and floor(other) > floor(module.name)
            if (there > here and found[other].package != "convert") or (beside and module.package == "omni_jax"):
                wrong.append(f"{module.name} -> {other}")
    return wrong


def alike(found: dict[str, Module]) -> list[tuple[str, str]]:
    """Pairs of places, as "module:line", that share ALIKE_LINES lines or more; of several, each with the first one."""
    written = {name: _code_lines(module) for name, module in found.items()}
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, lines in written.items():
        for i in range(len(lines) - ALIKE_LINES + 1):
            places[tuple(text for _, text in lines[i : i + ALIKE_LINES])].append((name, i))
    pairs = {(same[0], other) for same in places.values() for other in same[1:]}
    starts = [(a, b) for a, b in pairs if ((a[0], a[1] - 1), (b[0], b[1] - 1)) not in pairs]
    return sorted((f"{m}:{written[m][i][0]}", f"{n}:{written[n][j][0]}") for (m, i), (n, j) in starts)


def _code_lines(module: Module) -> list[tuple[int, str]]:
    """Number and text of each line that counts."""
    skipped = set()
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = ((i, line.strip()) for i, line in enumerate(module.lines, 1) if i not in skipped)
    return [(i, text) for i, text in numbered if text and not text.startswith("#")]


def ninetieth(values: list[int]) -> int:
    """The 90th percentile, by nearest rank."""
    return sorted(values)[max(0, -(-len(values) * 9 // 10) - 1)]


def main(places: bool = False) -> None:
    """Print the figures.

    Args:
        places: name the places that miss the goals too.
    """
    found = modules()
    for package in PACKAGES:
        sizes = [len(module.lines) for module in found.values() if module.package == package]
        print(f"{package}: {len(sizes)} files, lines median {median(sizes):g}, max {max(sizes)}")
    source = {name: module for name, module in found.items() if module.package != "tests"}
    functions = [function for module in source.values() for function in module.functions]
    sizes = [function.lines for function in functions]
    print(f"{len(sizes)} functions: lines median {median(sizes):g}, p90 {ninetieth(sizes)}, max {max(sizes)}")
    arrays = [f for f in functions if f.public and f.has_arrays and ast.get_docstring(f.node)]
    bare = [f.name for f in arrays if not f.has_shapes]
    print(
        f"{len(arrays)} public docstrings with arrays in the signature: {1 - len(bare) / len(arrays):.0%} have shapes"
    )
    listed = {
        "docstrings without shapes": bare,
        "import circles": [" <-> ".join(circle) for circle in circles(found)],
        "upward imports": upward(found, floors()),
        f"pairs of places with {ALIKE_LINES} equal lines": [f"{a} = {b}" for a, b in alike(source)],
        f"functions of more than {MAX_PARAMETERS} parameters": [
            f"{f.name}: {f.parameters}" for f in functions if f.parameters > MAX_PARAMETERS
        ],
    }
    for title, names in listed.items():
        print(f"{title}: {len(names)}", *(names if places else ()), sep="\n    ")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m scripts.house", description=__doc__)
