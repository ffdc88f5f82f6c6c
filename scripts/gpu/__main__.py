"""Check and measure on a GPU machine: versions, correctness, kernels, the model, its speech, beside transformers.

    python -m scripts.gpu results/                         # the public 30B-A3B shape; needs 80 GB
    python -m scripts.gpu results/ --shape tiny            # the same steps, small: runs on CPU too
    python -m scripts.gpu results/ --only kernels model
    python -m scripts.gpu results/ --only speech speech_bench --limit 280     # with a limit per section

Needs tyro, jax, flax and numpy; torch and transformers for the comparison, tokamax for the grouped kernels. Each
section runs in a process of its own, so that its memory is released and a crash costs one section: its error is
printed, the others follow, and the exit status is 1. Every section leaves `<section>.json` in the folder; `summary.md`
is rewritten after each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from scripts.gpu.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
RUN_SECTION = "import sys; from scripts.gpu.sections import run_section; run_section(*sys.argv[1:])"
Section = Literal["versions", "correctness", "kernels", "bench", "model", "speech", "speech_bench"]


def markdown(sections: dict[str, dict]) -> str:
    """All sections for people."""
    lines = ["# GPU check", ""]
    for name, found in sections.items():
        if found.get("error"):
            lines += [f"**{name} failed:** {found['error']}", ""]
        for title, (head, *rows) in found.get("tables", {}).items():
            lines += [f"## {title}", "", "| " + " | ".join(map(str, head)) + " |", "|---" * len(head) + "|"]
            lines += ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
            lines.append("")
        for text in found.get("text", []):
            lines += [f"## {name.capitalize().replace('_', ' ')}", "", "```", text, "```", ""]
    return "\n".join(lines)


def run_apart(name: str, shape: str, folder: Path, limit: float) -> dict:
    """Run one section in a process of its own, for at most `limit` seconds, and return its results."""
    file = folder / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-c", RUN_SECTION, name, shape, str(folder)]
    try:
        code = subprocess.run(command, timeout=limit, check=False, cwd=ROOT).returncode
    except subprocess.TimeoutExpired:
        code = -1
    if file.exists():
        return json.loads(file.read_text())
    return {"error": f"the process ended with {code}" if code >= 0 else f"took longer than {limit:.0f} s"}


def check(
    folder: Annotated[Path, tyro.conf.Positional],
    shape: Literal["full", "tiny"] = "full",
    only: tuple[Section, ...] = (),
    limit: float = 1800.0,
) -> int:
    """Run the sections and summarise them.

    Args:
        folder: where results are written.
        shape: the public shape, or a small one for a machine without GPU.
        only: sections to run; all by default.
        limit: seconds that one section may take.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict] = {}
    for name in only or SECTIONS:
        print(f"== {name}", flush=True)
        sections[name] = run_apart(name, shape, folder, limit)
        (folder / "summary.md").write_text(markdown(sections))
        print(markdown({name: sections[name]}), flush=True)
    return int(any(found.get("error") for found in sections.values()))


if __name__ == "__main__":
    # Sections run on one device, those of scripts/bench in processes beside their parent.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(tyro.cli(check, prog="python -m scripts.gpu", description=__doc__))
