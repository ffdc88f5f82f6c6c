"""One input that cannot be used, and the words that its error must contain."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.errors import OmniError


@dataclass(frozen=True)
class Case:
    """What a user or an adversary does, and how it must end.

    name: in words, unique. act: does it in an empty folder of its own; `World` gives what is costly to make. words:
    each must occur in the message. error: the class that must be raised.
    """

    name: str
    act: Callable[[Path, Any], Any]
    words: tuple[str, ...]
    error: type[OmniError] = OmniError
