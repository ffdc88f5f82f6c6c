"""Several processes as one program: every process runs the same commands, and together they hold one mesh.

JAX's own runtime does the work. A scheduler that it knows (SLURM, Open MPI) tells it everything; anywhere else three
numbers are enough. A process that is lost ends all others: those that wait for it in a collective fail there, the rest
within `LOST_SECONDS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from omni_jax.errors import InputError

# Seconds without a sign of life after which a process counts as lost, and that the last ones wait for each other.
LOST_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Flags of commands that may run on several devices and as several processes."""

    mesh: str | None = None
    """Devices to lay the model over: expert=4,data=2, by part thinker:expert=4;talker:expert=2, or auto."""
    distributed: bool = False
    """This is one of several processes: of a scheduler's (SLURM, Open MPI), or as the next three flags say."""
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
        if not host or not port.isdigit():
            raise InputError(f"coordinator {coordinator!r}; it must be HOST:PORT, such as node0:12345")
        if not 0 <= process < processes:
            raise InputError(f"process is {process} of {processes} processes; they are numbered from 0")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=120,
            heartbeat_timeout_seconds=LOST_SECONDS,
            shutdown_timeout_seconds=LOST_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if "must be defined" in str(error) or "should be defined" in str(error):
            remedy = "start it with srun or mpirun, or give coordinator, processes and process"
            raise InputError(f"no scheduler that JAX knows started this process; {remedy}") from error
        raise InputError(f"the processes did not come together: {str(error)[:300]}") from error


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def agreed(numbers: Mapping[int, float]) -> dict[int, float]:
    """The first process's numbers, for decisions that all must take alike; all must ask, for the same keys."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    values = broadcast_one_to_all(np.asarray(list(numbers.values()), np.float32))
    return dict(zip(numbers, np.asarray(values).tolist(), strict=True))
