"""The documents, held against the source: names in them exist, the map is whole, the README is short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MODULES = sorted(path for path in (ROOT / "omni_jax").rglob("*.py") if path.name != "__init__.py")
FOREIGN = {"grad"}  # names in decisions.md that belong to other projects
by_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def _section(path: Path, heading: str) -> str:
    return path.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def _anchors(path: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_map_names_every_module(path):
    """In a row of its package, or of the package above where that has no row of its own."""
    rows = [row for row in _section(ROOT / "README.md", "Map").splitlines() if row.startswith("| `")]
    folder = path.relative_to(ROOT / "omni_jax").parent
    name = f"`{path.name}`" if folder == Path(".") else f"`{path.stem}`"
    assert [row for row in rows if name in row and (folder == Path(".") or row.startswith(f"| `{folder}/`"))]


def test_map_names_nothing_else():
    for row in _section(ROOT / "README.md", "Map").splitlines():
        if folder := re.match(r"\| `((?:inputs|ops|models|weights|decode|evaluate)/(?:\w+/)?)`", row):
            names = re.findall(r"`(\w+)`", row.split("|")[2])
            assert not [n for n in names if not (ROOT / "omni_jax" / folder[1] / f"{n}.py").exists()]


def test_files_of_decisions_exist():
    rows = re.findall(r"^\|.*\| ([^|]*) \|$", (ROOT / "docs" / "decisions.md").read_text(), re.M)
    for row in rows:
        folder = Path("omni_jax")
        for name in re.findall(r"`([\w/.]+)`", row):
            # A name without a folder lies beside the one before it.
            places = [ROOT / name, ROOT / "omni_jax" / name, ROOT / folder / name]
            found = [place for place in places if place.exists()]
            assert found, name
            folder = found[0].parent.relative_to(ROOT)


def test_names_of_decisions_exist():
    """Every identifier in backticks, but for those of other projects, is written somewhere in the source."""
    text = (ROOT / "docs" / "decisions.md").read_text()
    names = {part for name in re.findall(r"`([\w.]+)\b[^`/]*`", text) for part in re.findall(r"\b[A-Za-z_]\w*", name)}
    source = "\n".join(path.read_text() for path in MODULES)
    assert sorted(names - set(re.findall(r"\w+", source)) - FOREIGN) == []


@by_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            name, _, anchor = target.partition("#")
            page = (path.parent / name).resolve() if name else path
            assert page.exists(), target
            assert not anchor or anchor in _anchors(page), target


@by_document
def test_scripts_that_are_named_exist(path):
    for name in re.findall(r"python -m ((?:scripts|convert|omni_jax)[\w.]*)", path.read_text()):
        place = ROOT / Path(*name.split("."))
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name


MADE = """
from typing import Any

import omni_jax as oj

omni = oj.load("ckpt/")
messages: list[dict[str, Any]] = []
"""
MISTAKES = """
import omni_jax as oj

omni = oj.load("ckpt/")
omni.generate([{"role": "user", "content": "Hi"}], temprature=0.5)
for reply in omni.generate([{"role": "user", "content": "Hi"}]):
    pass
omni.generate({"messages": [{"role": "user", "content": "Hi"}], "tools": []}, max_new_tokens=3).text
"""


@pytest.mark.slow
def test_a_type_checker_accepts_the_examples_and_sees_mistakes(tmp_path):
    """Every document's blocks, one after the other; an unknown setting; one reply taken for several."""
    for path in DOCUMENTS:
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
        (tmp_path / f"{path.stem}_blocks.py").write_text(MADE + "".join(blocks))
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    errors = [line.strip() for line in done.stdout.splitlines() if " - error: " in line]
    assert [re.findall(r"mistakes.py:(\d+)", line) for line in errors] == [["5"], ["6"]], done.stdout
