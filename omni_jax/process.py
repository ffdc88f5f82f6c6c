"""A command as a process: how it begins and ends. The standard library only, imported before all that takes time.

Interrupts. A thread waits for them while the main thread imports, compiles or computes. Nothing is raised in the main
thread: inside a callback or destructor of a C++ library an exception is swallowed, or crashes the process. The first
interrupt ends the process with one line and status 130, unless the main thread is in a `finishing` block; then the
process ends at the next `check`, or at the end of the block. The second interrupt ends it at once.

Streams. A line is out once it is printed, whatever standard output is: at an interrupt nothing can be flushed, since
the main thread may hold the stream, or wait for a pipe that nobody reads. Printing never raises. Characters that a
terminal cannot encode are replaced. A stream that cannot be written drops the rest, and the exit status reports it. So
a broken pipe never keeps a command from writing its files.

Ends. The process leaves by `os._exit`: while the interpreter shuts down, libraries with threads of their own may crash.
"""

import atexit
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn, TextIO

FAILED, BAD_INPUT, UNSCORED, INTERRUPTED, UNREAD = 1, 3, 4, 130, 141
# Seconds after which a process that is still finishing what it has begun says that it was interrupted.
QUIET_SECONDS = 1.0


class Output(io.TextIOWrapper):
    """A standard stream; the first failure to write is kept, and nothing is raised."""

    failure: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write as far as possible; at once if Python was told not to buffer."""
        try:
            written = super().write(text)
            if self.write_through:
                super().flush()
            return written
        except OSError as error:
            self.failure = self.failure or error
            return len(text)

    def flush(self) -> None:
        """Flush as far as possible."""
        try:
            super().flush()
        except OSError as error:
            self.failure = self.failure or error


class _Process:
    """The state of this process, if it is a command's.

    finishing: the notes of the blocks that the main thread is in. farewell: what other processes must be told before
    this one is gone without success.
    """

    def __init__(self) -> None:
        self.name = ""
        self.lock = threading.Lock()
        self.finishing: list[str] = []
        self.interrupted = self.said = False
        self.saying, self.ending = threading.Lock(), threading.Lock()
        self.farewell: Callable[[], None] | None = None


_process = _Process()


def enter(name: str, module: str) -> NoReturn:
    """Be the command `name`: run `main` of a module, which may take time to import, and end with the status it returns.

    An exception that `main` does not explain is a bug, and keeps its traceback.
    """
    _process.name = name
    _open_streams()
    _await_interrupts()
    try:
        status = import_module(module).main()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:
        status = FAILED
        if not _process.interrupted:
            import traceback

            traceback.print_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = FAILED
    _end(INTERRUPTED if _process.interrupted else status or 0)


@contextmanager
def finishing(note: str = "") -> Iterator[None]:
    """A block in which the first interrupt does not end a command: the next `check` does, or the end of the block.

    note: printed at the interrupt, for a user who has to wait. Outside `enter`, where Python raises KeyboardInterrupt,
    this does nothing.
    """
    with _process.lock:
        _process.finishing.append(note)
    try:
        yield
    finally:
        with _process.lock:
            _process.finishing.pop()
    check()


def check() -> None:
    """Raise KeyboardInterrupt if the command was interrupted, at a place where that is safe."""
    if _process.interrupted:
        raise KeyboardInterrupt


def unread() -> bool:
    """Whether standard output has failed, so that a command which only prints may end."""
    return isinstance(sys.stdout, Output) and sys.stdout.failure is not None


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the host or of a device ran out."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def answer_on(descriptor: int) -> None:
    """Let standard output be another file descriptor, open for writing."""
    sys.stdout = _stream(descriptor, "replace", sys.stdout)


def before_failing(farewell: Callable[[], None]) -> None:
    """Call `farewell` before this process ends without success; it must not take long, and what it raises is lost."""
    _process.farewell = farewell


def _open_streams() -> None:
    """Make all three streams usable. A closed descriptor would be given to the next file, and libraries write to 2."""
    closed = [descriptor for descriptor in (0, 1, 2) if not _is_open(descriptor)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = _stream(1, "replace", sys.stdout)
    sys.stderr = sys.__stderr__ = _stream(2, "backslashreplace", sys.stderr)
    if 1 in closed:
        print(f"{_process.name}: standard output is closed; send it to a file, or to {os.devnull}", file=sys.stderr)
        _end(BAD_INPUT)


def _is_open(descriptor: int) -> bool:
    with suppress(OSError):
        os.fstat(descriptor)
        return True
    return False


def _stream(descriptor: int, errors: str, before: TextIO | None) -> Output:
    """A stream in the place of another, with its encoding and, as with `python -u`, without a buffer."""
    buffer, encoding = os.fdopen(descriptor, "wb", closefd=False), before and before.encoding
    unbuffered = getattr(before, "write_through", False)
    return Output(buffer, encoding, errors, line_buffering=True, write_through=unbuffered)


def _await_interrupts() -> None:
    """Start the thread that answers interrupts, unless they are ignored, as in a script's background job."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _note)
    # Restart system calls after the signal, also in libraries that do not expect one.
    signal.siginterrupt(signal.SIGINT, False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_answer_interrupts, args=(reading,), daemon=True).start()


def _note(*_: object) -> None:
    """Run by the main thread, so that an end which the signal caused there counts as an interrupt."""
    _process.interrupted = True


def _forget() -> None:
    """Be an ordinary process again, as a child that was forked."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _answer_interrupts(reading: int) -> None:
    """The thread: end the process at the first interrupt or, while it is finishing something, at the second."""
    _wait(reading)
    # Held to the end unless something is finishing, so that no `finishing` block begins any more.
    _process.lock.acquire()
    _process.interrupted = True
    notes = [note for note in _process.finishing if note]
    if not _process.finishing:
        threading.Thread(target=_end, args=(INTERRUPTED,), daemon=True).start()
        _wait(reading)
    else:
        _process.lock.release()
        if notes or not _wait(reading, QUIET_SECONDS):
            _say(*(notes or ["cleaning up"]), "interrupt again to end at once")
            _wait(reading)
    _say()
    os._exit(INTERRUPTED)


def _wait(reading: int, seconds: float | None = None) -> bool:
    """Wait for one interrupt, or so long; whether it came."""
    while select.select([reading], [], [], seconds)[0]:
        if os.read(reading, 1)[0] == signal.SIGINT:
            return True
    return False


def _say(*notes: str) -> None:
    """Say once that the process was interrupted, waiting no longer than QUIET_SECONDS for somebody to read it."""
    with _process.saying:
        if _process.said:
            return
        _process.said = True
        bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
        begun = "\n" if len(bars) or os.isatty(2) else ""
        line = f"{begun}{'; '.join([f'{_process.name}: interrupted', *notes])}\n"
        # In a thread that may wait for ever: room in a pipe may be gone as soon as it is seen.
        writer = threading.Thread(target=_write_error, args=(line,), daemon=True)
        writer.start()
        writer.join(QUIET_SECONDS)


def _write_error(text: str) -> None:
    """Write straight to the descriptor: the main thread may hold the stream."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


def _end(status: int) -> NoReturn:
    """Leave with a status, or another one where standard output was not written."""
    if status == INTERRUPTED:
        _process.ending.acquire()  # Never released: only one thread ends the process.
        _say()
    if status and _process.farewell is not None:
        with suppress(BaseException):
            _process.farewell()
    elif status != INTERRUPTED:
        sys.stdout.flush()  # What is called next may take long, and be interrupted.
        atexit._run_exitfuncs()
    if status != INTERRUPTED:
        status = _written(status)
    os._exit(status)


def _written(status: int) -> int:
    """The status, once all that was printed is out; a failure to print replaces success only."""
    sys.stdout.flush()
    failure = sys.stdout.failure if isinstance(sys.stdout, Output) else None
    left = isinstance(failure, BrokenPipeError)
    if failure is not None and not left:
        reason = (failure.strerror or str(failure)).lower()
        print(
            f"{_process.name}: standard output cannot be written ({reason}); make room, or send it elsewhere",
            file=sys.stderr,
        )
    sys.stderr.flush()
    if failure is None or status:
        return status
    return UNREAD if left else BAD_INPUT
