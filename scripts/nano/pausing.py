"""How stages run a recipe of training: what loads its model, and a pause after some time, from which it goes on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import omni_jax
from omni_jax import process
from omni_jax.omni import Omni


def load_parts(model: Path, parts: tuple[str, ...], mesh: str | None) -> Omni:
    """Load parts of a model, as recipes call for them."""
    return omni_jax.load(model, parts=parts, mesh=mesh)


@contextmanager
def paused_after(seconds: float) -> Iterator[None]:
    """End the block by KeyboardInterrupt after so many seconds, when training has saved a checkpoint.

    A process that is not training by then ends at once, with the same status. SIGTERM does the same at any time.
    """
    process.end_on_terminate()
    timer = Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
