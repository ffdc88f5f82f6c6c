"""Stand-ins for what a server is made of, importable in its worker processes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from omni_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent


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
def listening(app: Any) -> Iterator[str]:
    """The address of an ASGI application that runs in a thread, on a free port."""
    import uvicorn

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=1)
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
def server(model: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator["Served"]:
    """A server process of a checkpoint on a free port; ended by SIGTERM, which must leave status 0.

    env: its environment, by default that of the test.
    """
    with TemporaryFile() as log:
        command = [sys.executable, "-m", "omni_jax", "serve", "--model", str(model), "--port", "0", *flags]
        process = subprocess.Popen(command, stderr=log, cwd=ROOT, env=env)
        try:
            served = Served(process, _url(process, log), log)
            yield served
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0, served.log()
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Served:
    """A server that runs. url: where, without a slash at the end."""

    process: subprocess.Popen
    url: str
    errors: IO[bytes]

    def log(self) -> str:
        """What it has written to standard error."""
        return _read(self.errors)


def _read(log: IO[bytes]) -> str:
    return os.pread(log.fileno(), 1 << 20, 0).decode()


def _url(process: subprocess.Popen, log: IO[bytes]) -> str:
    """Where a process serves, once it does."""
    for _ in range(1200):
        if found := re.search(r"at (http://\S+)", _read(log)):
            return found[1]
        assert process.poll() is None, _read(log)
        time.sleep(0.1)
    raise TimeoutError(_read(log))
