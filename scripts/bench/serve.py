"""One measured system in a process of its own: load it, then run one repetition for each line on stdin.

Run as a file, by `worker`, with the checkout that it measures as working directory and PYTHONPATH. That may be an older
checkout, whose benchmark is `scripts/bench.py` with one set of options for everything; repetitions and the names of
their parts are the same there. Every line on stdout is one JSON object: first what is known about the system, then
seconds by part.
"""

import json
import os
import resource
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

OLDER = Path("scripts", "bench.py")
STATUS = Path("/proc/self/status")


def main() -> None:
    """Serve until stdin ends."""
    request = json.loads(sys.argv[1])
    # Whatever a library prints must not reach the parent as an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    start = time.perf_counter()
    system = older_system(request) if OLDER.is_file() else current_system(request)
    answer({"load_seconds": time.perf_counter() - start, **source(), **system.about})
    for _ in sys.stdin:
        start = time.perf_counter()
        parts = system.repeat()
        seconds, device = time.perf_counter() - start, system.memory()
        answer({"repetition": seconds, "peak_bytes": device["peak_bytes_in_use"] if device else peak_bytes(), **parts})


def current_system(request: dict[str, Any]) -> Any:
    """The system that a module of this benchmark builds."""
    from scripts.bench import options

    values = request["options"]
    settings = getattr(options, request["kind"])(**{**values, "run": options.Run(**values["run"])})
    return getattr(import_module(request["module"]), request["system"])(settings, directory(request))


def older_system(request: dict[str, Any]) -> Any:
    """The same of a checkout whose modules lie side by side in scripts/."""
    sys.path.insert(0, str(OLDER.parent.absolute()))
    worker: Any = import_module("bench_worker")
    name = request["module"].rpartition(".")[2]
    kinds = {"speech": name == "speech", "speculative": name == "drafting"}
    values = {**request["options"], **request["options"]["run"], **kinds}
    bench = worker.Bench(**{name: values[name] for name in worker.Bench.__dataclass_fields__ if name in values})
    return getattr(worker.kind(bench), request["system"])(bench, directory(request))


def peak_bytes() -> int:
    """The most memory that this process has held; on Linux without that of the process that started it."""
    if STATUS.is_file():
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def directory(request: dict[str, Any]) -> Path | None:
    """The checkpoint to load, or None for random weights made on the device."""
    return Path(request["directory"]) if request["directory"] else None


def source() -> dict[str, str]:
    """The package that is measured; RuntimeError if it is not that of the working directory."""
    import omni_jax

    folder = Path(omni_jax.__file__).resolve().parent.parent
    if folder != Path.cwd().resolve():
        raise RuntimeError(f"{Path.cwd()} is to be measured, but omni_jax was imported from {folder}")
    return {"checkout": str(folder), "version": omni_jax.__version__}


if __name__ == "__main__":
    main()
