"""Interrupts of a run, as a terminal sends them: the sample under way ends first, and nothing is lost."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from omni_jax.evaluate.stored import read_all
from tests.helpers.datasets import write

# The command with a model that says when a reply is under way and ends it when it is told so, by a line or the end of
# its input.
COMMAND = """
import sys
from omni_jax.process import enter
def main():
    import omni_jax
    from omni_jax import cli
    from omni_jax.weights import checkpoint
    from tests.evaluate.stub import StubOmni
    stub = StubOmni(checkpoint.read_config(sys.argv[1]))
    answers = stub._answers
    def slow(prompts, slots):
        for answer in answers(prompts, slots):
            print("under way", flush=True)
            sys.stdin.readline()
            yield answer
    stub._answers = slow
    omni_jax.load = lambda *_, **__: stub
    cli.main(sys.argv[2:])
enter("omni-jax", "__main__")
"""


def start(model: Path, data: Path, output: Path) -> subprocess.Popen[str]:
    asked = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(output), "--json", "--slots", "1"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(model), *asked], text=True, **pipes)
    # A defect fails the test, and does not hold up the others.
    timer = Timer(300, process.kill)
    timer.daemon = True
    timer.start()
    return process


def until_under_way(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"


def end_sample(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def interrupt(process: subprocess.Popen[str]) -> str:
    """Send the first interrupt and wait until it has been noticed: what was written on stderr until then."""
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    lines = []
    while not lines or "interrupted" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], "it ended without a word"
    return "".join(lines)


def rest(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What else it writes on stdout and stderr, until it ends."""
    assert process.stdout is not None and process.stderr is not None
    said = process.stdout.read(), process.stderr.read()
    process.wait()
    return said


def test_the_first_interrupt_ends_a_run_after_the_sample_under_way(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *[{"prompt": f"row {i}", "reference": f"row {i}"} for i in range(6)])
    process = start(model, data, tmp_path / "out")
    for _ in range(2):
        until_under_way(process)
        end_sample(process)
    until_under_way(process)
    err = interrupt(process)
    end_sample(process)
    out, more = rest(process)
    assert process.returncode == 130 and out == ""
    (line,) = [line for line in (err + more).splitlines() if "interrupted" in line]
    assert "the sample under way ends first, and the same command goes on" in line and "Traceback" not in err + more
    assert [result["id"] for result in read_all(tmp_path / "out")] == ["#0", "#1", "#2"]
    assert not (tmp_path / "out" / "report.md").exists()

    again, whole = start(model, data, tmp_path / "out"), start(model, data, tmp_path / "whole")
    (said, _), (want, _) = again.communicate(timeout=120), whole.communicate(timeout=120)
    assert (again.returncode, whole.returncode) == (0, 0)
    assert said.splitlines()[-1] == want.splitlines()[-1] and json.loads(said.splitlines()[-1])["scored"] == 6
    for name in ("results-00000.jsonl", "report.md", "summary.json", "run.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("sent", [2, 5])
def test_the_second_interrupt_ends_it_at_once(sent: int, model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *[{"prompt": f"row {i}"} for i in range(3)])
    process = start(model, data, tmp_path / "out")
    until_under_way(process)
    err = interrupt(process)
    for _ in range(sent - 1):
        process.send_signal(signal.SIGINT)
    # It has not been told that the sample may end.
    out, more = rest(process)
    assert process.returncode == 130 and out == "" and "Traceback" not in err + more
    assert (err + more).count("interrupted") == 1
