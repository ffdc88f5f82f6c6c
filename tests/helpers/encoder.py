"""An encoder of a small checkpoint beside transformers'."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One checkpoint's audio or vision encoder, here and in transformers; `encode` is ours, compiled."""

    config: Any
    params: dict
    reference: Any
    encode: Callable[..., Any]
