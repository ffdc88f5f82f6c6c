"""What commands end with and must never print."""

import re

import numpy as np

from omni_jax.cli import main


def status_of(asked: list[str]) -> int:
    try:
        return main(asked) or 0
    except SystemExit as end:
        return int(end.code or 0)


def hear(wave: np.ndarray, rate: int) -> str:
    return "a"


# What no message may show: an object's address, a bare errno, the name of another library's class.
OPAQUE = re.compile(r"0x[0-9a-f]{6,}|\[Errno|<_io|Traceback|<class|object at")
