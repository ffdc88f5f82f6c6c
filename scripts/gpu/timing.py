"""A measurement on the device, and beside it what the judge of `scripts/aot` expects of the very program that ran.

Times are wall clock around `block_until_ready`, the median of some repetitions after one that compiles. The judge reads
the compiled program's own text, so it sees what the compiler of this machine made, autotuned kernels included. Its
figures are those of an H200, whatever the device.
"""

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from scripts.aot.hlo import Module
from scripts.aot.traffic import Judge, expected_share

# How often a named measurement counts in another one.
Parts = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Timing:
    """One measurement.

    milliseconds: of one turn of what was called, the median. first_seconds: of the first call, which compiles. rate:
    `unit` per second. expected_ms, launches, moved_gb: what the judge expects of a turn; None where it was not asked.
    goal: what must be reached. parts: the measurements whose expected times together are expected here. note: whatever
    else a reader must know.
    """

    name: str
    milliseconds: float
    first_seconds: float
    rate: float = 0.0
    unit: str = ""
    goal: str = ""
    expected_ms: float | None = None
    launches: int | None = None
    moved_gb: float | None = None
    parts: Parts = ()
    note: str = ""


@dataclass(frozen=True)
class Case:
    """What is measured: its name, the turns of a loop that one call runs, and what one turn makes.

    work: of one turn, in `unit`. goal: what must be reached. share: of a layer's experts, what a turn is expected to
    read. repetitions: calls that count.
    """

    name: str
    turns: int = 1
    work: float = 0.0
    unit: str = ""
    goal: str = ""
    share: float = 1.0
    repetitions: int = 3


def measure(case: Case, run: Callable[[], Any]) -> Timing:
    """Time `run`, which returns arrays."""
    times = []
    for _ in range(1 + case.repetitions):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:]) / case.turns
    rate = case.work / seconds if case.work else 0.0
    return Timing(case.name, 1e3 * seconds, times[0], rate, case.unit, case.goal)


def measure_judged(case: Case, lower: Callable[[], Any], run: Callable[[], Any]) -> Timing:
    """Time `run`, a call of the program that `lower` lowers, and judge that program."""
    start = time.perf_counter()
    compiled = lower().compile()
    compiling = time.perf_counter() - start
    timing = measure(case, run)
    return replace(timing, first_seconds=compiling + timing.first_seconds, **judged(compiled, case.share))


def judged(compiled: Any, share: float) -> dict[str, Any]:
    """The judge's figures of a compiled program; of a loop whose length nobody knows, one turn counts.

    What the judge cannot read must not lose the measurement: it becomes a note.
    """
    try:
        judge = Judge(Module(compiled.as_text()), share)
        total = judge.total()
        return {"expected_ms": 1e3 * judge.seconds(), "launches": total.launches, "moved_gb": total.moved / 1e9}
    except Exception as error:
        traceback.print_exc()
        return {"note": f"not judged: {type(error).__name__}: {str(error)[:100]}"}


def share_of(text: Any, rows: int) -> float:
    """The share of a layer's experts that `rows` rows are expected to choose, for a decoder's configuration."""
    return expected_share(rows, text.num_experts, text.experts_per_token)
