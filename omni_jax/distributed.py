"""Several processes as one program: every process runs the same commands, and together they hold one mesh.

JAX's own runtime does the work. It detects SLURM, Open MPI and Kubernetes (with the package `kubernetes`); elsewhere
three values are needed: the coordinator, how many processes there are, and which one this is. If a process dies, all
others end: those that wait for it in a collective fail there, the rest within `LOST_SECONDS`.

On CPU, all processes must reach their first collective within 30 seconds of each other, because they connect in it;
later ones may wait as long as needed. So processes meet at a barrier as soon as they have joined, before they load.
"""

import errno
import pickle
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from omni_jax.errors import InputError
from omni_jax.process import before_failing

# Seconds within which all processes must have started; a node may first have to pull a container image.
START_SECONDS = 600
# Seconds without a heartbeat after which a process counts as lost, and that processes wait for each other at the end.
LOST_SECONDS = 30
# Seconds that a failing process waits for others that fail too: the first one to exit ends all others.
LEAVE_SECONDS = 5
# What a value's size is written in, and bytes that are sent at once with it.
SIZE_BYTES, SMALL_BYTES = 8, 4096

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Flags of commands that can run on several devices and as several processes."""

    mesh: str | None = None
    """Devices to place the model on: expert=4,data=2, by part thinker:expert=4;talker:expert=2, or auto."""
    distributed: bool = False
    """Run as one of several processes: those of SLURM, Open MPI or Kubernetes, or as the next three flags state."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which one this is, from 0."""

    def join(self) -> None:
        """Join the other processes, if there are any; InputError for flags that do not belong together."""
        stated = (self.coordinator, self.processes, self.process)
        if self.distributed:
            start(*stated)
        elif stated != (None, None, None):
            raise InputError("--coordinator, --processes and --process need --distributed")


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes; call it before anything else uses a device.

    Give all three arguments, or none to read them from the scheduler. InputError, with the remedy, where that fails.

    Args:
        coordinator: "HOST:PORT" of process 0, reachable from all processes.
        processes: how many processes there are.
        process: which one this is, from 0.
    """
    stated = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in stated.items() if value is None]
    if missing and len(missing) < len(stated):
        raise InputError(f"{', '.join(missing)} missing: give coordinator, processes and process, or none of them")
    if coordinator is not None and processes is not None and process is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"coordinator {coordinator!r}; it must be HOST:PORT, such as node0:12345")
        if not 0 <= process < processes:
            raise InputError(f"process is {process} of {processes} processes; they are numbered from 0")
        if process == 0:
            _check_free(int(port))
        else:
            _wait_for(host, int(port))
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
        before_failing(_wait_for_others)
        barrier("joined")
    # Detecting a scheduler may raise anything: it reads files, resolves names and calls servers.
    except Exception as error:
        if "must be defined" in str(error) or "should be defined" in str(error):
            remedy = "start it with srun or mpirun, or in Kubernetes as an indexed job with omni_jax[k8s] installed"
            remedy += ", or give coordinator, processes and process"
            raise InputError(f"no scheduler that JAX knows started this process; {remedy}") from error
        raise InputError(f"the processes did not come together: {str(error)[:1000]}") from error


def _check_free(port: int) -> None:
    """InputError if a program listens on the port already.

    JAX would listen there too, each process would reach either one, and the processes of two runs would mix and hang.
    """
    with socket.socket() as probe:
        # Only a listener is in the way, not a closed connection that lingers.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            remedy = "choose another port"
            if error.errno == errno.EADDRINUSE:
                remedy = "an earlier run may not have ended: wait for it, or choose another port"
            raise InputError(f"port {port} of the coordinator cannot be used ({error.strerror}); {remedy}") from error


def _wait_for(host: str, port: int) -> None:
    """Wait until process 0 listens; InputError if it takes too long: JAX would end the process without a message."""
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            with socket.create_connection((host, port), timeout=LOST_SECONDS):
                return
        except OSError as error:
            if time.monotonic() > until:
                remedy = "start process 0 in time, and name its host and port to all"
                raise InputError(f"nobody listens at {host}:{port} ({error}); {remedy}") from error
        time.sleep(1)


def barrier(where: str) -> None:
    """Wait until all processes have reached this point; returns at once if there is one process."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(where)


def _wait_for_others() -> None:
    """Wait briefly for other processes that fail too, so that each can report why.

    Used instead of `jax.distributed.shutdown`, which would wait for every process and then abort.
    """
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    get_barrier_sync_fn()(key="leave", timeout_ms=1000 * LEAVE_SECONDS)


def is_primary() -> bool:
    """Whether this is process 0, which prints and writes files."""
    return jax.process_index() == 0


def min_over_processes(number: int) -> int:
    """The smallest of all processes' numbers; every process must call this."""
    from jax.experimental.multihost_utils import process_allgather

    return int(np.min(process_allgather(np.float64(number))))


def value_from_first(value: T) -> T:
    """Process 0's value, which can be pickled, in every process; all must call this, and theirs are not looked at."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = pickle.dumps(value) if is_primary() else b""
    known = len(data).to_bytes(SIZE_BYTES, "big") + data
    first = np.zeros(SMALL_BYTES, np.uint8)
    first[: len(known)] = np.frombuffer(known[:SMALL_BYTES], np.uint8)
    received = np.asarray(broadcast_one_to_all(first)).astype(np.uint8).tobytes()
    size = int.from_bytes(received[:SIZE_BYTES], "big")
    if (more := size + SIZE_BYTES - SMALL_BYTES) > 0:
        # As few sizes as powers of two, each of which is compiled.
        rest = np.zeros(1 << (more - 1).bit_length(), np.uint8)
        rest[: len(known[SMALL_BYTES:])] = np.frombuffer(known[SMALL_BYTES:], np.uint8)
        received += np.asarray(broadcast_one_to_all(rest)).astype(np.uint8).tobytes()
    return pickle.loads(received[SIZE_BYTES : SIZE_BYTES + size])


def broadcast_from_first(numbers: Mapping[int, float]) -> dict[int, float]:
    """Process 0's numbers, for decisions that must agree; every process must call this, with the same keys."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    values = broadcast_one_to_all(np.asarray(list(numbers.values()), np.float32))
    return dict(zip(numbers, np.asarray(values).tolist(), strict=True))
