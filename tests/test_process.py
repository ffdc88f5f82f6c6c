"""How a command begins and ends, tried on small programs in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ONE_LINE = "program: interrupted\n"
# Processes that the test under way has begun.
BEGUN: list[subprocess.Popen] = []
READY = "from pathlib import Path\nfrom omni_jax import process\nimport gc, os, sys, time\n"


def begin(folder: Path, source: str, *, closed: str = "", **options: Any) -> subprocess.Popen:
    """A command whose module is `source`; it makes a file "ready" where it is to be interrupted.

    closed: streams that are closed when it begins, as a shell writes it.
    """
    (folder / "program.py").write_text(READY + source)
    code = "from omni_jax.process import enter; enter('program', 'program')"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    BEGUN.append(subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes))
    return BEGUN[-1]


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Kill what a test that failed has begun."""
    yield
    while BEGUN:
        with BEGUN.pop() as process:
            process.kill()


@pytest.fixture(autouse=True)
def interrupts_are_not_ignored() -> Iterator[None]:
    """As they would be in tests that a script runs beside it; processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Its status and what it wrote."""
    out, err = process.communicate(timeout=30)
    return process.returncode, out or "", err or ""


def interrupt(process: subprocess.Popen, folder: Path) -> None:
    """Interrupt a process as soon as it is ready."""
    wait_for(folder / "ready", process)
    process.send_signal(signal.SIGINT)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait for a file that a process makes."""
    until = time.monotonic() + 20
    while not path.exists():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"no {path.name}: {process.communicate()}")
        time.sleep(0.005)


SLEEP = "Path('ready').touch()\n{0}time.sleep(30)\n"
SWALLOWS = """
def main():
    Path('ready').touch()
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            pass
"""
DESTRUCTOR = """
class Slow:
    def __del__(self):
        Path('ready').touch()
        time.sleep(30)

def main():
    Slow()
"""
CALLBACK = """
def main():
    gc.callbacks.append(lambda *_: (Path('ready').touch(), time.sleep(30)))
    gc.collect()
"""
LEAVING = """
import atexit

def main():
    atexit.register(lambda: (Path('ready').touch(), time.sleep(30)))
"""
NATIVE = """
import ctypes

def main():
    Path('ready').touch()
    ctypes.CDLL(None).sleep(30)
"""
BAR = """
from tqdm import tqdm

def main():
    with tqdm(total=3) as bar:
        bar.update()
        Path('ready').touch()
        time.sleep(30)
"""


@pytest.mark.parametrize(
    "source",
    [
        SLEEP.format(""),
        "def main():\n    " + SLEEP.format("    "),
        SWALLOWS,
        DESTRUCTOR,
        CALLBACK,
        LEAVING,
        NATIVE,
    ],
    ids=["import", "main", "swallows", "destructor", "callback", "leaving", "native"],
)
def test_an_interrupt_ends_a_command_wherever_it_falls(source: str, tmp_path: Path) -> None:
    process = begin(tmp_path, source)
    interrupt(process, tmp_path)
    start = time.monotonic()
    assert ended(process) == (130, "", ONE_LINE)
    assert time.monotonic() - start < 10


def test_the_line_begins_behind_a_bar(tmp_path: Path) -> None:
    process = begin(tmp_path, BAR)
    interrupt(process, tmp_path)
    status, _, err = ended(process)
    assert status == 130 and err.endswith("\n" + ONE_LINE)


FINISHES = """
def main():
    with process.finishing({note!r}):
        try:
            Path('half').touch()
            Path('ready').touch()
            for _ in range(3000):
                try:
                    time.sleep(0.01)
                except BaseException:
                    Path('raised').touch()
                {each}
        finally:
            Path('half').unlink()
    Path('beyond').touch()
"""


def test_what_is_being_finished_ends_at_the_next_check(tmp_path: Path) -> None:
    process = begin(tmp_path, FINISHES.format(note="", each="process.check()"))
    interrupt(process, tmp_path)
    assert ended(process) == (130, "", ONE_LINE)
    assert {path.name for path in tmp_path.iterdir()} <= {"program.py", "ready", "__pycache__"}


def test_a_block_that_ends_by_itself_is_the_last(tmp_path: Path) -> None:
    process = begin(tmp_path, FINISHES.format(note="", each="if process._process.interrupted: break"))
    interrupt(process, tmp_path)
    assert ended(process) == (130, "", ONE_LINE)
    assert {path.name for path in tmp_path.iterdir()} <= {"program.py", "ready", "__pycache__"}


@pytest.mark.parametrize(
    "note, said", [("the sample goes on", "the sample goes on"), ("", "cleaning up")], ids=["note", "no note"]
)
def test_a_second_interrupt_ends_what_is_being_finished(note: str, said: str, tmp_path: Path) -> None:
    process = begin(tmp_path, FINISHES.format(note=note, each="pass"))
    interrupt(process, tmp_path)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line == f"program: interrupted; {said}; interrupt again to end at once\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", "") and (tmp_path / "half").exists()


def test_errors_that_an_interrupt_causes_are_not_told(tmp_path: Path) -> None:
    source = """
def main():
    with process.finishing():
        Path('ready').touch()
        try:
            while True:
                time.sleep(0.01)
                process.check()
        except KeyboardInterrupt:
            raise RuntimeError("a library's own words")
"""
    process = begin(tmp_path, source)
    interrupt(process, tmp_path)
    assert ended(process) == (130, "", ONE_LINE)


def test_a_farewell_comes_first_unless_interrupted_again(tmp_path: Path) -> None:
    source = """
def farewell():
    Path('farewell').touch()
    time.sleep({seconds})

def main():
    process.before_failing(farewell)
    Path('ready').touch()
    time.sleep(30)
"""
    process = begin(tmp_path, source.format(seconds=0))
    interrupt(process, tmp_path)
    assert ended(process) == (130, "", ONE_LINE) and (tmp_path / "farewell").exists()
    for name in ("ready", "farewell"):
        (tmp_path / name).unlink()
    process = begin(tmp_path, source.format(seconds=30))
    interrupt(process, tmp_path)
    wait_for(tmp_path / "farewell", process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "", ONE_LINE)


FINISHING = """
    with process.finishing():
        Path('ready').touch()
        time.sleep(30)
"""
AT_EXIT = "    import atexit; atexit.register(lambda: (Path('ready').touch(), time.sleep(30)))\n"


@pytest.mark.parametrize(
    "printed, then, unbuffered",
    [
        ("the answer\n", FINISHING, ""),
        ("the answer\n", "    " + SLEEP.format("    "), ""),
        ("no whole line", AT_EXIT, ""),
        ("no whole line", "    " + SLEEP.format("    "), "1"),
    ],
    ids=["finishing", "main", "leaving", "unbuffered"],
)
def test_an_interrupt_loses_nothing_that_was_printed(printed: str, then: str, unbuffered: str, tmp_path: Path) -> None:
    source = f"def main():\n    print({printed!r}, end='')\n{then}"
    with (tmp_path / "out").open("w") as out:
        process = begin(tmp_path, source, stdout=out, env={"PYTHONUNBUFFERED": unbuffered})
        interrupt(process, tmp_path)
        if then == FINISHING:
            assert process.stderr is not None and "again" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130
    assert (tmp_path / "out").read_text() == printed


def test_an_interrupt_ends_a_command_whose_output_is_not_read(tmp_path: Path) -> None:
    """The main thread holds the stream, and waits for the pipe."""
    source = """
import threading

def main():
    threading.Timer(0.2, Path('ready').touch).start()
    print('x' * 100_000)
"""
    with full_pipe() as writing:
        process = begin(tmp_path, source, stdout=writing)
        interrupt(process, tmp_path)
        assert ended(process) == (130, "", ONE_LINE)


@pytest.mark.parametrize("source, times", [("def main():\n    " + SLEEP.format("    "), 1), (FINISHES, 2)])
def test_an_interrupt_ends_a_command_whose_errors_are_not_read(source: str, times: int, tmp_path: Path) -> None:
    with full_pipe() as writing:
        process = begin(tmp_path, source.format(note="it takes long", each="pass"), stderr=writing)
        for _ in range(times):
            interrupt(process, tmp_path)
            time.sleep(0.1)  # Interrupts that come at once may be one.
        start = time.monotonic()
        assert ended(process)[:2] == (130, "")
        assert time.monotonic() - start < 10


@contextmanager
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe that has no room left, and is not read."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    yield writing
    os.close(reading)
    os.close(writing)


def test_a_job_that_ignores_interrupts_goes_on(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = """
def main():
    Path('ready').touch()
    while not Path('sent').exists():
        time.sleep(0.005)
    print('done')
"""
    process = begin(tmp_path, source)
    interrupt(process, tmp_path)
    (tmp_path / "sent").touch()
    assert ended(process) == (0, "done\n", "")


def test_a_forked_child_is_an_ordinary_process(tmp_path: Path) -> None:
    source = """
import signal

def main():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, b'.')
            time.sleep(30)
        except KeyboardInterrupt:
            os._exit(7)
        os._exit(8)
    os.close(writing)
    os.read(reading, 1)
    os.kill(child, signal.SIGINT)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
    assert ended(begin(tmp_path, source)) == (7, "", "")


WRITES = """
def main():
    print('answer')
    print('progress', file=sys.stderr)
    Path('asked').write_text('written')
    return {status}
"""
BROKEN = "program: standard output cannot be written (no space left on device); make room, or send it elsewhere\n"


def no_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    "stream, opened, want",
    [
        ("stdout", no_reader, (141, "", "progress\n")),
        ("stdout", lambda: os.open("/dev/full", os.O_WRONLY), (3, "", f"progress\n{BROKEN}")),
        ("stdout", lambda: os.open("/dev/null", os.O_RDONLY), (3, "", "bad file descriptor")),
        ("stderr", no_reader, (0, "answer\n", "")),
        ("stderr", lambda: os.open("/dev/full", os.O_WRONLY), (0, "answer\n", "")),
    ],
)
def test_streams_that_cannot_be_written(stream: str, opened: Callable[[], int], want: Any, tmp_path: Path) -> None:
    descriptor = opened()
    streams: dict[str, Any] = {stream: descriptor}
    status, out, err = ended(begin(tmp_path, WRITES.format(status=0), **streams))
    os.close(descriptor)
    assert (status, out) == want[:2] and want[2] in err and len(err.splitlines()) <= 2
    assert (tmp_path / "asked").read_text() == "written"


@pytest.mark.parametrize(
    "opened, said", [(no_reader, ""), (lambda: os.open("/dev/full", os.O_WRONLY), BROKEN)], ids=["no reader", "full"]
)
@pytest.mark.parametrize("status", [1, 3, 4])
def test_a_failure_is_not_hidden_by_a_broken_stream(
    status: int, opened: Callable[[], int], said: str, tmp_path: Path
) -> None:
    descriptor = opened()
    assert ended(begin(tmp_path, WRITES.format(status=status), stdout=descriptor)) == (status, "", "progress\n" + said)
    os.close(descriptor)


def test_both_streams_may_end_in_one_broken_pipe(tmp_path: Path) -> None:
    descriptor = no_reader()
    assert ended(begin(tmp_path, WRITES.format(status=0), stdout=descriptor, stderr=descriptor))[0] == 141
    os.close(descriptor)


def test_closed_streams(tmp_path: Path) -> None:
    """A file that a command opens must not get their numbers, to which libraries write."""
    source = (
        "def main():\n    print(os.open('a', os.O_CREAT) > 2, sys.stdin.read() == '')\n    print('x', file=sys.stderr)"
    )
    assert ended(begin(tmp_path, source, closed="0<&- 2>&-")) == (0, "True True\n", "")
    status, _, err = ended(begin(tmp_path, source, closed="0<&- 1>&-"))
    assert status == 3 and "standard output is closed; send it to a file, or to /dev/null" in err


@pytest.mark.parametrize("encoding, want", [("ascii", "? ?"), ("latin-1", "é ?"), ("utf-8", "é 音")])
def test_letters_that_a_terminal_lacks_are_replaced(encoding: str, want: str, tmp_path: Path) -> None:
    source = "def main():\n    print('é 音')\n    print('é 音 \\udc80', file=sys.stderr)"
    process = begin(tmp_path, source, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert ended(process)[:2] == (0, want + "\n")


@pytest.mark.parametrize(
    "source, status, said",
    [
        ("def main():\n    pass", 0, ""),
        ("def main():\n    return 4", 4, ""),
        ("def main():\n    sys.exit('in words')", 1, r"in words\n"),
        ("def main():\n    raise KeyError('a bug')", 1, r"Traceback [\s\S]*KeyError: 'a bug'\n"),
        ("import nothing_of_this_name", 1, r"Traceback [\s\S]*ModuleNotFoundError.*\n"),
    ],
)
def test_statuses(source: str, status: int, said: str, tmp_path: Path) -> None:
    got, _, err = ended(begin(tmp_path, source))
    assert got == status and re.fullmatch(said, err)


def test_what_libraries_do_at_the_end_is_done(tmp_path: Path) -> None:
    source = "import atexit\ndef main():\n    atexit.register(lambda: print('farewell'))"
    assert ended(begin(tmp_path, source)) == (0, "farewell\n", "")
