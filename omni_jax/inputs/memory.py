"""What memory there is, so that what a request needs can be compared with it before it is taken."""

from pathlib import Path

from omni_jax.errors import InputError


def available_bytes() -> int | None:
    """Bytes that this process can still take: of the machine, or of its container if that is less; None if unknown."""
    found = [_machine(), _container()]
    return min((n for n in found if n is not None), default=None)


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise InputError if `needed` bytes are more than there are."""
    there = available_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"{what} would take {needed / 1e9:.1f} GB of memory and {there / 1e9:.1f} GB are free; {remedy}"
        )


def _machine() -> int | None:
    """MemAvailable of Linux: what can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _container() -> int | None:
    """What is left of a control group's limit, where there is one."""
    group = Path("/sys/fs/cgroup")
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(int((group / most).read_text()) - int((group / used).read_text()), 0)
        except (OSError, ValueError):  # "max" is no limit
            continue
    return None
