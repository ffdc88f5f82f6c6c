"""Free memory, with which the needs of a request are compared before anything is allocated."""

from pathlib import Path

from omni_jax.errors import InputError

GROUP = Path("/sys/fs/cgroup")
# For both versions of control groups: files of the limit, of the usage and of its parts; the prefix of these parts.
_CONTROL = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)


def available_bytes() -> int | None:
    """Bytes that this process can still allocate, on the machine or in its container; None if unknown."""
    found = [_machine(), _container()]
    return min((n for n in found if n is not None), default=None)


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise InputError if `needed` bytes are more than are free; `what` needs them, `remedy` ends the message."""
    there = available_bytes()
    if there is not None and needed > there:
        raise InputError(
            f"{what} would take {needed / 1e9:.1f} GB of memory and {there / 1e9:.1f} GB are free; {remedy}"
        )


def _machine() -> int | None:
    """MemAvailable of Linux: bytes that can be allocated without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _container() -> int | None:
    """The rest of a control group's limit, if there is one; cached files count as free."""
    for most, used, detail, prefix in _CONTROL:
        try:
            limit, taken = (int((GROUP / name).read_text()) for name in (most, used))
            lines = dict(line.split() for line in (GROUP / detail).read_text().splitlines())
            copies = sum(int(lines.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
            return min(max(limit - taken + copies, 0), limit)
        except (OSError, ValueError):  # "max" is no limit
            continue
    return None
