"""Directories as Orbax and TensorStore take them, and their errors in words that name the directory and the remedy."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from omni_jax.errors import CheckpointError
from omni_jax.files import reason_of

UNWRITABLE = "written; is the disk full or read-only?"
# What Orbax or TensorStore misreads in a path: as a pattern, a separator, an address, or as no text at all.
MISREAD = re.compile(r"[\[\\\ud800-\udfff]|:/")


def is_misread(directory: Path) -> bool:
    """Whether Orbax or TensorStore would look for what is in a directory elsewhere."""
    return MISREAD.search(f"{directory}/") is not None


@contextmanager
def explained(directory: Path, what: str, *passing: type[Exception]) -> Iterator[None]:
    """Turn what Orbax raises into "the parameters cannot be `what`".

    `passing` and errors that already explain themselves go through unchanged.
    """
    try:
        yield
    except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError, *passing):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{directory}: the parameters cannot be {what} ({reason_of(error.__cause__ or error)})"
        ) from error


@contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """A path by which Orbax and TensorStore find a directory: its own, or a link that exists while the block runs."""
    if not is_misread(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="omni_jax-") as folder:
        link = Path(folder) / "checkpoint"
        link.symlink_to(directory.absolute(), target_is_directory=True)
        yield link


def unreadable(directory: Path) -> str:
    """What cannot be done with a damaged checkpoint, and the remedy, for `explained`."""
    return f"read: `python -m convert --verify {directory}` names what is damaged; copy or convert it again"
