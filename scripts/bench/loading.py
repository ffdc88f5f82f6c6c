"""Measure the memory that a host needs while it loads a model onto a mesh, above its share of the weights.

    python -m scripts.bench loading --shape large

A checkpoint with random weights is written and converted, then loaded onto expert=8: converted (`oj.load`) and directly
from safetensors (`convert.load_hf`), by one process with eight virtual CPU devices and by two with four each. Every
process is new. The share of a process is what its own devices hold, distinct buffers only; on CPU they lie in its
memory. The requirement is that its peak exceeds its share by at most one shard, the largest piece of an array that any
device holds. The figures also include what Python and the libraries need meanwhile, some tens of megabytes whatever the
size of the model.

Peaks are memory that belongs to the process (RssAnon and RssShmem of /proc/self/status, read every two milliseconds)
above what it held when everything was imported and the devices were known. Mapped files belong to the page cache; how
much more of them was resident is reported in a column of its own. VmHWM, which the kernel keeps without sampling and
which includes mapped files, is an upper bound of the peak.
"""

import ctypes
import gc
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any

from scripts.bench.compare import write_json
from scripts.bench.options import Loading

MESH, DEVICES = "expert=8", 8
# How a model is loaded, and by how many processes.
WAYS = tuple((how, processes) for how in ("oj.load", "convert.load_hf") for processes in (1, 2))
STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.002
TITLES = ("loaded by", "processes", "share, MB", "largest shard, MB", "above share, MB", "beyond one shard, MB",
          "VmHWM above, MB", "mapped, MB", "seconds")  # fmt: skip


@dataclass(frozen=True)
class Load:
    """One way to load `directory`: by process `process` of `processes`, with an equal part of the devices each."""

    how: str
    directory: Path
    dtype: str
    processes: int = 1
    process: int = 0
    coordinator: str = ""


def report(options: Loading) -> None:
    """Measure all ways to load, print the table, and write the JSON if asked for."""
    found = run(options.shape, options.dtype)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, jax {found[0]['jax']}")
    print(f"{options.shape}, {options.dtype}, {found[0]['weights'] / 1e9:.2f} GB of weights, on {MESH}; by process")
    print(table(found))
    write_json(options.json, options, found)


def run(shape: str, dtype: str) -> list[dict[str, Any]]:
    """The figures of every process of every way to load a random checkpoint of `shape`."""
    from convert import convert_checkpoint
    from scripts.small.checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        written = make_checkpoint(Path(folder) / "hf", shape, dtype=dtype)
        converted = Path(folder) / "converted"
        convert_checkpoint(written, converted)
        directories = {"oj.load": converted, "convert.load_hf": written}
        return [found for how, processes in WAYS for found in measure(how, directories[how], dtype, processes)]


def measure(how: str, directory: Path, dtype: str, processes: int) -> list[dict[str, Any]]:
    """The figures of each of `processes` new processes that load a directory together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    running, pipes = [], []
    for process in range(processes):
        pipe, child = context.Pipe()
        load = Load(how, directory, dtype, processes, process, coordinator)
        running.append(context.Process(target=work, args=(load, child), daemon=True))
        running[-1].start()
        child.close()
        pipes.append(pipe)
    try:
        found = [pipe.recv() for pipe in pipes]
    except EOFError:
        raise RuntimeError(f"a process that loads with {how} failed; its error is printed above") from None
    for pipe in pipes:
        pipe.send(True)
    for process in running:
        process.join()
    return found


def work(load: Load, pipe: Connection) -> None:
    """A process that loads: sends its figures, and ends at the next message."""
    devices = DEVICES // load.processes
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if load.processes > 1:
        from omni_jax.distributed import start

        start(load.coordinator, load.processes, load.process)
    import jax

    params_of = loader(load)
    jax.devices()
    _release()
    before, started = memory(), time.perf_counter()
    with watched() as peak:
        params = jax.block_until_ready(params_of())
    seconds, after = time.perf_counter() - started, memory()
    pieces = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    # Devices of one process may share a buffer that holds the same numbers.
    share = sum({x.unsafe_buffer_pointer(): x.nbytes for x in pieces}.values())
    pipe.send(
        {
            "how": load.how,
            "processes": load.processes,
            "process": load.process,
            "weights": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
            "share": share,
            "largest_shard": max(x.nbytes for x in pieces),
            "above_share": peak["own"] - before["own"] - share,
            "kernel_peak_above_share": after["VmHWM"] - before["VmRSS"] - share,
            "mapped": peak["RssFile"] - before["RssFile"],
            "held": after["own"] - before["own"],
            "seconds": seconds,
            "jax": jax.__version__,
        }
    )
    pipe.recv()


def loader(load: Load) -> Any:
    """A function that loads the parameters, with everything imported that it needs."""
    import orbax.checkpoint  # noqa: F401
    import tensorstore  # noqa: F401

    import convert
    import omni_jax

    if load.how == "oj.load":
        return lambda: omni_jax.load(load.directory, mesh=MESH, dtype=load.dtype).params
    return lambda: convert.load_hf(load.directory, dtype=load.dtype, mesh=MESH)[0]


def memory() -> dict[str, int]:
    """Bytes by the names of /proc/self/status, and as `own` those that belong to this process alone."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    sizes = {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    return {**sizes, "own": sizes["RssAnon"] + sizes["RssShmem"]}


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """The largest figures of `memory` while the block runs; they are complete after it."""
    peak, over = memory(), Event()

    def look() -> None:
        while not over.wait(SAMPLE_SECONDS):
            note()

    def note() -> None:
        peak.update({name: max(size, peak[name]) for name, size in memory().items()})

    watcher = Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        note()


def _release() -> None:
    """Release what imports left unused, which loading could otherwise fill unseen, and reset the kernel's peak."""
    gc.collect()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def table(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown, one line per process."""
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    for process in found:
        cells = [
            process["how"],
            f"{process['process'] + 1} of {process['processes']}",
            *(f"{process[key] / 1e6:.0f}" for key in ("share", "largest_shard", "above_share")),
            f"{(process['above_share'] - process['largest_shard']) / 1e6:.0f}",
            *(f"{process[key] / 1e6:.0f}" for key in ("kernel_peak_above_share", "mapped")),
            f"{process['seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
