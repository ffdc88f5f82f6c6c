"""Steps of a section, one after the other: what each finds is written before the next begins.

A step that fails costs itself alone, and one for which too little time is left is not begun. So whatever ends the
process, its file holds what was found until then, which step ran, and the names of those that are left.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True)
class Step:
    """A named step that returns dataclasses, and the seconds without which it is not worth beginning."""

    name: str
    run: Callable[[], Sequence[Any]]
    seconds: float = 15.0


@dataclass(frozen=True)
class Fact:
    """Something that was read, by its name."""

    name: str
    value: str


@dataclass(frozen=True)
class Profile:
    """Where the time of a program goes: name, milliseconds and calls of its kernels."""

    title: str
    kernels: list[tuple[str, float, int]]


def run_steps(steps: Sequence[Step], file: Path, deadline: float) -> dict[str, Any]:
    """Run steps until the time `deadline`, as of `time.time`, and return what the file then holds.

    Found dataclasses stand in lists by the name of their class; "errors": of the steps that failed; "left": names of
    those that have not been run to their end; "running": the one that runs.
    """
    found: dict[str, Any] = {"errors": [], "left": [step.name for step in steps], "running": "", "seconds": 0.0}
    began = time.time()
    for step in steps:
        if time.time() + step.seconds > deadline:
            continue
        found["running"] = step.name
        write_json(file, found)
        try:
            for one in step.run():
                found.setdefault(type(one).__name__.lower(), []).append(asdict(one))
        except Exception as error:
            traceback.print_exc()
            found["errors"].append(f"{step.name}: {type(error).__name__}: {str(error)[:300]}")
        found["left"].remove(step.name)
        found["seconds"] = time.time() - began
    found["running"] = ""
    write_json(file, found)
    return found


def write_json(file: Path, values: Any) -> None:
    """Write a file that is whole at every moment."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(values, indent=1))
    os.replace(part, file)


def once(make: Callable[[], Made]) -> Callable[[], Made]:
    """`make`, called when its result is first wanted; an error is raised again instead of being met again."""
    kept: list[tuple[Made | None, Exception | None]] = []

    def get() -> Any:
        if not kept:
            try:
                kept.append((make(), None))
            except Exception as error:
                kept.append((None, error))
        made, error = kept[0]
        if error is not None:
            raise error
        return made

    return get
