"""A command as a process: how it starts and ends. Uses the standard library only, and is imported before anything slow.

Interrupts. A thread waits for them while the main thread imports, compiles or computes. Nothing is raised in the main
thread: inside a callback or destructor of a C++ library an exception is swallowed, or crashes the process. The first
interrupt ends the process with one line and status 130, unless the main thread is in a `finishing` block; then the
process ends at the next `check`, or at the end of the block. The second interrupt ends it at once.

Streams. Standard output is line-buffered, even into a file or pipe: at an interrupt nothing can be flushed, because
the main thread may hold the stream, or wait for a pipe that nobody reads. Printing never raises. Characters that a
terminal cannot encode are replaced. After a failed write the rest is dropped, and the exit status reports the failure.
So a broken pipe never keeps a command from writing its files.

Exit. The process ends with `os._exit`, because libraries with threads of their own may crash while the interpreter
shuts down.
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
# Seconds after which an interrupted process that is still busy in a `finishing` block says so.
QUIET_SECONDS = 1.0


class Output(io.TextIOWrapper):
    """A standard stream that never raises; `failure` is the first error of a write."""

    failure: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write as much as possible, and flush at once under `python -u`."""
        try:
            written = super().write(text)
            if self.write_through:
                super().flush()
            return written
        except OSError as error:
            self.failure = self.failure or error
            return len(text)

    def flush(self) -> None:
        """Flush as much as possible."""
        try:
            super().flush()
        except OSError as error:
            self.failure = self.failure or error


class _Process:
    """The state of a command's process.

    finishing: the notes of the `finishing` blocks that the main thread is in. farewell: called before the process ends
    without success, to notify other processes.
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
    """Run the command `name`: import `module`, which may take long, call its `main`, and exit with the status.

    An exception that leaves `main` is a bug, and is printed with its traceback.
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
    """A block in which the first interrupt does not end a command at once: the next `check` or the block's end does.

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
    """Raise KeyboardInterrupt if the command was interrupted; call it where that is safe."""
    if _process.interrupted:
        raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether the command was interrupted, for what has to save something before it calls `check`."""
    return _process.interrupted


def end_on_terminate() -> None:
    """Take SIGTERM, which schedulers send before they kill, as an interrupt; for commands that save their work."""
    signal.signal(signal.SIGTERM, _terminate)


def unread() -> bool:
    """Whether standard output has failed, so that a command that only prints may stop."""
    return isinstance(sys.stdout, Output) and sys.stdout.failure is not None


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that the host or a device is out of memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def answer_on(descriptor: int) -> None:
    """Redirect standard output to another file descriptor, which is open for writing."""
    sys.stdout = _stream(descriptor, "replace", sys.stdout)


def before_failing(farewell: Callable[[], None]) -> None:
    """Call `farewell` before this process ends without success; it must be quick, and its exceptions are ignored."""
    _process.farewell = farewell


def _open_streams() -> None:
    """Make all three streams usable. The next file opened would get a closed descriptor, and libraries write to 2."""
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
    """A stream that replaces `before`, with its encoding and, under `python -u`, without a buffer too."""
    buffer, encoding = os.fdopen(descriptor, "wb", closefd=False), before and before.encoding
    unbuffered = getattr(before, "write_through", False)
    return Output(buffer, encoding, errors, line_buffering=True, write_through=unbuffered)


def _await_interrupts() -> None:
    """Start the thread that handles interrupts, unless they are ignored, as in the background job of a script."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _note)
    # System calls are restarted after the signal, for libraries that do not expect one.
    signal.siginterrupt(signal.SIGINT, False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_answer_interrupts, args=(reading,), daemon=True).start()


def _note(*_: object) -> None:
    """The signal handler, run by the main thread: an exit that the signal causes there counts as an interrupt."""
    _process.interrupted = True


def _terminate(*_: object) -> None:
    """The handler of SIGTERM, run by the main thread; the interrupt itself may be ignored, as in a background job."""
    if _process.interrupted or not _process.finishing:
        _end(INTERRUPTED)
    _note()
    _say(*filter(None, _process.finishing))


def _forget() -> None:
    """Restore the default handling of interrupts, in a forked child."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _answer_interrupts(reading: int) -> None:
    """The thread: end the process at the first interrupt or, inside a `finishing` block, at the second."""
    _wait(reading)
    # Kept unless a `finishing` block is active, so that no further block can begin.
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
    """Wait for an interrupt, at most `seconds`; whether it came."""
    while select.select([reading], [], [], seconds)[0]:
        if os.read(reading, 1)[0] == signal.SIGINT:
            return True
    return False


def _say(*notes: str) -> None:
    """Print once that the process was interrupted; wait at most QUIET_SECONDS for the message to be written."""
    with _process.saying:
        if _process.said:
            return
        _process.said = True
        bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
        begun = "\n" if len(bars) or os.isatty(2) else ""
        line = f"{begun}{'; '.join([f'{_process.name}: interrupted', *notes])}\n"
        # In a thread of its own, because writing to a full pipe may block forever.
        writer = threading.Thread(target=_write_error, args=(line,), daemon=True)
        writer.start()
        writer.join(QUIET_SECONDS)


def _write_error(text: str) -> None:
    """Write directly to the descriptor, because the main thread may hold the stream."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


def _end(status: int) -> NoReturn:
    """Exit with a status, or with another one if standard output could not be written."""
    if status == INTERRUPTED:
        _process.ending.acquire()  # never released: only one thread ends the process
        _say()
    if status and _process.farewell is not None:
        with suppress(BaseException):
            _process.farewell()
    elif status != INTERRUPTED:
        sys.stdout.flush()  # the exit functions may take long, and be interrupted
        atexit._run_exitfuncs()
    if status != INTERRUPTED:
        status = _written(status)
    os._exit(status)


def _written(status: int) -> int:
    """The status after all output is flushed; a failure to print replaces a status of success only."""
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
