"""Several processes as one program: every process runs the same commands, and together they hold one mesh.

JAX's own runtime does the work. A scheduler that it knows (SLURM, Open MPI) tells it everything; anywhere else three
numbers are enough. A process that is lost ends all others: those that wait for it in a collective fail there, the rest
within `LOST_SECONDS`.
"""

import jax

from omni_jax.errors import InputError

# Seconds without a sign of life after which a process counts as lost, and that the last ones wait for each other.
LOST_SECONDS = 30


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
