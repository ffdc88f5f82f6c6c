"""A server process of this checkout, started for a measurement or a test and ended after it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from omni_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS, END_SECONDS, POLL_SECONDS = 1800, 120, 0.1


@dataclass(frozen=True)
class Served:
    """A server that runs. url: where, without a slash at the end."""

    process: subprocess.Popen
    url: str
    errors: IO[bytes]

    def log(self) -> str:
        """What it has written to standard error."""
        return _words(self.errors)

    def end(self) -> int:
        """End it by SIGTERM, and by SIGKILL if it goes on: its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextmanager
def served(model: str | Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """A server of a model on a free port; InputError with its last words if it ends before it listens.

    environment: what is added to that of this process.
    """
    command = [sys.executable, "-P", "-m", "omni_jax", "serve", "--model", str(model), "--port", "0", *flags]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log, env=variables)
        try:
            found = Served(process, _url(process, log), log)
            yield found
            found.end()
        finally:
            process.kill()
            process.wait()


def _words(log: IO[bytes]) -> str:
    return os.pread(log.fileno(), 1 << 20, 0).decode("utf-8", "replace")


def _url(process: subprocess.Popen, log: IO[bytes]) -> str:
    """Where a process serves, once it does."""
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit:
        ended, words = process.poll() is not None, _words(log)
        if found := re.search(r"^serving .* at (http://\S+)", words, re.MULTILINE):
            return found[1]
        if ended:
            raise InputError(f"the server has ended before it listened: {words.strip()[-1000:]}")
        time.sleep(POLL_SECONDS)
    raise InputError(f"the server does not listen after {START_SECONDS} s")
