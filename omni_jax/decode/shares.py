"""What each of several replies that run at once takes of the time that passes, and whether a program was compiled then.

Each moment is split equally among the replies that are under way, so that the shares of all add up to the time that all
took together, whatever their number was meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax

from omni_jax.decode.request import Request


@dataclass
class _Share:
    """The share of one reply: seconds, and the programs that were compiled while it was under way."""

    seconds: float = 0.0
    compiled: int = 0


class Shares:
    """The shares of requests, by `lap` as time passes; what passes between `lap` and `skip` is nobody's."""

    def __init__(self, compiled: Sequence[str]):
        """compiled: grows by every program that is compiled, as from `compilations`."""
        self._compiled, self._of = compiled, dict[Request, _Share]()
        self.skip()

    def skip(self) -> None:
        """Leave out what has passed until now."""
        self._since, self._seen = perf_counter(), len(self._compiled)

    def lap(self, requests: Sequence[Request]) -> None:
        """Split what has passed since the last call among requests."""
        seconds, compiled = perf_counter() - self._since, len(self._compiled) - self._seen
        self.skip()
        for request in requests:
            share = self._of.setdefault(request, _Share())
            share.seconds += seconds / len(requests)
            share.compiled += compiled

    def take(self, request: Request) -> dict[str, Any]:
        """A request's share as its reply's stats report it; it is forgotten here."""
        share = self._of.pop(request)
        return {"share_seconds": share.seconds, "compiled": share.compiled}


@contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows by every program that is compiled inside the block."""
    compiled = []

    def listener(event: str, duration_secs: float, **more: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
