"""Preparing prompts in processes of their own: media of clients are decoded where they can do no harm.

Decoders in C may hang, crash, or take all memory of a machine. Each worker holds the processor of the model and no
weight, has a limit of memory, and is ended and replaced when it exceeds its limit of time or dies. What it decodes for
one client it does alone, so its end fails nobody else.

    conversation -> Workers.prepare -> pipe -> worker: Processor.prepare -> pipe -> Batch
"""

import asyncio
import pickle
import resource
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import omni_jax
from omni_jax.errors import InputError, OmniError
from omni_jax.files import reason_of
from omni_jax.inputs.batch import Batch
from omni_jax.inputs.processor import Processor

START_SECONDS = 120.0  # of a process, which imports what decodes media


@dataclass(frozen=True)
class WorkerLimits:
    """count: of processes. seconds: for one conversation. memory_bytes: that it may take beside what a worker has."""

    count: int = 2
    seconds: float = 60.0
    memory_bytes: int = 4 << 30


class Workers:
    """A few processes that prepare conversations, each one at a time; started when they are first needed."""

    def __init__(self, processor: Processor, limits: WorkerLimits):
        self.limits = limits
        self._threads = ThreadPoolExecutor(limits.count, thread_name_prefix="prepare")
        self._workers = [_Worker(processor, limits) for _ in range(limits.count)]
        self._free: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in self._workers:
            self._free.put_nowait(worker)

    async def prepare(self, conversation: Any, options: dict[str, Any]) -> Batch:
        """The batch of one conversation, as `Processor.prepare` gives it with these options.

        Raises its InputError, and one for a conversation that takes too much time or memory.
        """
        worker = await self._free.get()
        work = asyncio.get_running_loop().run_in_executor(self._threads, worker.prepare, conversation, options)
        # A worker is free once its work is done, also if nobody waits for it any more.
        work.add_done_callback(lambda _: self._free.put_nowait(worker))
        return await asyncio.shield(work)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """One process, and the pipe to it."""

    def __init__(self, processor: Processor, limits: WorkerLimits):
        self._processor, self._limits = processor, limits
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def prepare(self, conversation: Any, options: dict[str, Any]) -> Batch:
        """As `Workers.prepare`, but it blocks."""
        try:
            connection = self._started()
            connection.send((conversation, options))
            if not connection.poll(self._limits.seconds):
                self.end()
                raise InputError(f"preparing the messages and their media took more than {self._limits.seconds:g} s; "
                                 "send fewer or smaller media")  # fmt: skip
            answer = connection.recv()
        except (EOFError, OSError) as error:
            self.end()
            raise InputError("preparing the messages and their media ended a process; a medium is damaged, or takes "
                             "too much memory") from error  # fmt: skip
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        """End the process, whatever it does; the next use starts another."""
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        if process is not None:
            process.kill()
            process.wait()
        if connection is not None:
            connection.close()

    def _started(self) -> Connection:
        """The pipe to the process, which is started if there is none."""
        if self._process is not None and self._process.poll() is None and self._connection is not None:
            return self._connection
        self.end()
        here, there = socket.socketpair()
        with there:
            command = [sys.executable, "-m", "omni_jax.serve.workers", str(there.fileno())]
            folder = str(Path(omni_jax.__file__).parent.parent)
            self._process = subprocess.Popen(command, pass_fds=[there.fileno()], cwd=folder, stdin=subprocess.DEVNULL)
        self._connection = Connection(here.detach())
        self._connection.send_bytes(pickle.dumps((self._processor, self._limits.memory_bytes)))
        if not self._connection.poll(START_SECONDS):
            raise OSError("a process did not start")
        self._connection.recv()
        return self._connection


def work(connection: Connection) -> None:
    """Prepare what comes through a pipe, until it is closed."""
    # An interrupt is for the server, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processor, memory_bytes = pickle.loads(connection.recv_bytes())
    _limit_memory(memory_bytes)
    connection.send("ready")
    while True:
        try:
            conversation, options = connection.recv()
            connection.send(_prepared(processor, conversation, options))
        except (EOFError, OSError):
            return


def _prepared(processor: Processor, conversation: Any, options: dict[str, Any]) -> Batch | OmniError | RuntimeError:
    """The batch of a conversation, or the error that a client gets."""
    try:
        return processor.prepare(conversation, **options)
    except OmniError as error:
        return InputError(str(error))
    except MemoryError:
        return InputError("the media take more memory than one request may; send fewer or smaller ones")
    except Exception as error:
        import traceback

        traceback.print_exc()
        return RuntimeError(f"{type(error).__name__}: {reason_of(error)}")


def _limit_memory(more: int) -> None:
    """Let this process take `more` bytes beside what it has; what asks for more gets a MemoryError, or crashes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        has = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return
    resource.setrlimit(resource.RLIMIT_DATA, (has + more, has + more))


if __name__ == "__main__":
    work(Connection(int(sys.argv[1])))
