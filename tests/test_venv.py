"""The scripts' environment: made by the newest supported Python, and one error where there is none."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "venv.sh"


def make_venv(folder: Path, **statuses: int) -> subprocess.CompletedProcess[str]:
    """Run `make_venv` with commands in `folder` that end with these statuses, and print their names when called."""
    for name, status in statuses.items():
        command = folder / name.replace("_", ".")
        command.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {status}\necho {command.name} $*\n')
        command.chmod(0o755)
    return subprocess.run(
        ["/bin/bash", "-c", f"PATH={folder}; source {SCRIPT}; make_venv"], capture_output=True, text=True, cwd=folder
    )


def test_the_newest_supported_python_makes_it(tmp_path: Path) -> None:
    # As version managers have it: a command that is there, for a version that is not.
    made = make_venv(tmp_path, python3_14=127, python3_13=0, python3_12=0, python3=0)
    assert (made.stdout, made.stderr) == ("python3.13 -m venv --clear .venv\n", "")


def test_a_python_without_a_number_is_enough(tmp_path: Path) -> None:
    assert make_venv(tmp_path, python3=0).stdout == "python3 -m venv --clear .venv\n"


def test_without_a_supported_python_the_error_names_the_remedy(tmp_path: Path) -> None:
    made = make_venv(tmp_path, python3_11=1, python3=1)
    assert made.returncode == 1 and "install python3.13" in made.stderr
