"""Several processes as one program: every process runs the same commands, and together they hold one mesh.

JAX's own runtime does the work. A scheduler that it knows (SLURM, Open MPI, Kubernetes with the package `kubernetes`)
tells it everything; anywhere else three numbers are enough. A process that is lost ends all others: those that wait for
it in a collective fail there, the rest within `LOST_SECONDS`.

On CPU, processes must come to the first collective of all within 30 seconds, in which they connect; behind it they may
wait for each other as long as they need. So they meet as soon as they know each other, before anything is loaded.
"""

import errno
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from omni_jax.errors import InputError
from omni_jax.process import before_failing

# Seconds in which all processes must have been started; a node may have to fetch an image before.
START_SECONDS = 600
# Seconds without a sign of life after which a process counts as lost, and that the last ones wait for each other.
LOST_SECONDS = 30
# Seconds that a process which gives up waits for others that do so too. When the first one goes it takes all with it.
LEAVE_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Flags of commands that may run on several devices and as several processes."""

    mesh: str | None = None
    """Devices to lay the model over: expert=4,data=2, by part thinker:expert=4;talker:expert=2, or auto."""
    distributed: bool = False
    """This is one of several processes: a scheduler's (SLURM, Open MPI, Kubernetes), or as the next three flags say."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which one this is, from 0."""

    def join(self) -> None:
        """Join the other processes, if there are any; InputError for flags that do not fit together."""
        stated = (self.coordinator, self.processes, self.process)
        if self.distributed:
            start(*stated)
        elif stated != (None, None, None):
            raise InputError("--coordinator, --processes and --process need --distributed")


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes; call it before anything else touches a device.

    coordinator: "HOST:PORT" of process 0, reachable by all; processes: how many there are; process: which one this is,
    from 0. All three or none, in which case the scheduler is asked. InputError, with the remedy, where that fails.
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
    # What asks a scheduler may raise anything: it reads files, resolves names and talks to servers.
    except Exception as error:
        if "must be defined" in str(error) or "should be defined" in str(error):
            remedy = "start it with srun or mpirun, or in Kubernetes as an indexed job with omni_jax[k8s] installed"
            remedy += ", or give coordinator, processes and process"
            raise InputError(f"no scheduler that JAX knows started this process; {remedy}") from error
        raise InputError(f"the processes did not come together: {str(error)[:1000]}") from error


def _check_free(port: int) -> None:
    """InputError if a program listens on the port.

    JAX would listen there too, and each process would reach one of both: those of two runs would mix, and hang.
    """
    with socket.socket() as probe:
        # Only who listens is in the way, not what is left of connections that are closed.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            remedy = "choose another port"
            if error.errno == errno.EADDRINUSE:
                remedy = "an earlier run may not have ended: wait for it, or choose another port"
            raise InputError(f"port {port} of the coordinator cannot be used ({error.strerror}); {remedy}") from error


def _wait_for(host: str, port: int) -> None:
    """Wait until process 0 listens; InputError if it does not in time: JAX would end the process without a word."""
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
    """Wait until all processes are at this place; alone, there is nothing to wait for."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(where)


def _wait_for_others() -> None:
    """Wait shortly for others that give up too, so that each can say why.

    It takes the place of JAX's farewell, which waits for all and aborts in vain.
    """
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    get_barrier_sync_fn()(key="leave", timeout_ms=1000 * LEAVE_SECONDS)


def is_primary() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def min_over_processes(number: int) -> int:
    """The smallest of all processes' numbers; all must ask."""
    from jax.experimental.multihost_utils import process_allgather

    return int(np.min(process_allgather(np.float64(number))))


def broadcast_from_first(numbers: Mapping[int, float]) -> dict[int, float]:
    """The first process's numbers, for decisions that all must take alike; all must ask, for the same keys."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    values = broadcast_one_to_all(np.asarray(list(numbers.values()), np.float32))
    return dict(zip(numbers, np.asarray(values).tolist(), strict=True))
