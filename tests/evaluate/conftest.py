"""Shared by the tests of evaluation: a converted checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest

import convert


@pytest.fixture(scope="session")
def model(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the small checkpoint, converted once per session."""
    destination = tmp_path_factory.mktemp("converted") / "small"
    convert.convert_checkpoint(checkpoints("small"), destination, progress=False)
    return destination
