"""What worker processes are asked, in a module that imports nothing of the project."""

import os
import signal
import sys
from typing import Any


def process_id(recipe: Any) -> int:
    """Its number."""
    return os.getpid()


def modules(recipe: Any) -> set[str]:
    """Which modules it has imported."""
    return set(sys.modules)


def blas_threads(recipe: Any) -> str | None:
    """How many threads its linear algebra was told to take."""
    return os.environ.get("OPENBLAS_NUM_THREADS")


def die(recipe: Any) -> None:
    """Be killed, as where memory has run out."""
    os.kill(os.getpid(), signal.SIGKILL)
