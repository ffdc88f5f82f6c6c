"""Several processes of a test that know of each other."""

import os
import socket
from pathlib import Path

from scripts.small.quick import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": QUICK_FLAGS, "PYTHONPATH": str(ROOT)}


def flags(processes: int) -> list[list[str]]:
    """The flags by which each of several processes knows of the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    known = ["--distributed", "--coordinator", coordinator, "--processes", str(processes), "--process"]
    return [[*known, str(i)] for i in range(processes)]
