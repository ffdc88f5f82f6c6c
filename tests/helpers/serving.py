"""Stand-ins for what a server is made of, importable in its worker processes."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from scripts.served import Served, served


@dataclass
class Acting:
    """Stands in for a processor: what a conversation says is done."""

    def prepare(self, conversation, **options):
        act, argument = conversation
        if act == "hang":
            time.sleep(600)
        if act == "crash":
            os._exit(9)
        if act == "grow":
            return len([bytes(1 << 20) for _ in range(argument)])
        if act == "fail":
            raise KeyError("inside")
        if act == "refuse":
            raise InputError("no such thing")
        return argument, options, os.getpid()


@contextmanager
def listening(app: Any, http: Any = "auto") -> Iterator[str]:
    """The address of an ASGI application that runs in a thread, on a free port; http: as uvicorn's."""
    import uvicorn

    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=http, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def server(model: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """A server process of a checkpoint on a free port; ended by SIGTERM, which must leave status 0.

    env: what is added to its environment.
    """
    with served(model, *flags, environment=env) as found:
        yield found
        assert found.end() == 0, found.log()
