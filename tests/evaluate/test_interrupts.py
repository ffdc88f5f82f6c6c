"""Interrupts of a run, as a terminal sends them: the sample under way ends first, and nothing is lost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omni_jax.evaluate.stored import read_all
from tests.evaluate.test_tasks import write

# The command with a model that takes a while for each reply, and says when one is under way.
COMMAND = """
import sys, time
from omni_jax.process import enter
def main():
    import omni_jax
    from omni_jax import checkpoint, cli
    from tests.evaluate.stub import StubOmni
    stub = StubOmni(checkpoint.read_config(sys.argv[1]))
    answers, seconds = stub._answers, float(sys.argv[2])
    def slow(prompts, slots):
        for answer in answers(prompts, slots):
            print("under way", flush=True)
            time.sleep(seconds)
            yield answer
    stub._answers = slow
    omni_jax.load = lambda *_, **__: stub
    cli.main(sys.argv[3:])
enter("omni-jax", "__main__")
"""


def start(model: Path, data: Path, output: Path, seconds: float) -> subprocess.Popen:
    asked = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(output), "--json", "--slots", "1"]
    command = [sys.executable, "-c", COMMAND, str(model), str(seconds), *asked]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_under_way(process: subprocess.Popen, times: int) -> None:
    assert process.stdout is not None
    for _ in range(times):
        assert process.stdout.readline() == "under way\n"


def test_the_first_interrupt_ends_a_run_after_the_sample_under_way(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *[{"prompt": f"row {i}", "reference": f"row {i}"} for i in range(6)])
    process = start(model, data, tmp_path / "out", 0.5)
    until_under_way(process, 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    (line,) = [line for line in err.splitlines() if "interrupted" in line]
    assert "the sample under way ends first, and the same command goes on" in line and "Traceback" not in err
    assert [result["id"] for result in read_all(tmp_path / "out")] == ["#0", "#1", "#2"]
    assert not (tmp_path / "out" / "report.md").exists()

    again = start(model, data, tmp_path / "out", 0.0)
    whole = start(model, data, tmp_path / "whole", 0.0)
    (said, _), (want, _) = again.communicate(timeout=60), whole.communicate(timeout=60)
    assert (again.returncode, whole.returncode) == (0, 0)
    assert said.splitlines()[-1] == want.splitlines()[-1] and json.loads(said.splitlines()[-1])["scored"] == 6
    for name in ("results-00000.jsonl", "report.md", "summary.json", "run.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("sent", [2, 5])
def test_the_second_interrupt_ends_it_at_once(sent: int, model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *[{"prompt": f"row {i}"} for i in range(3)])
    process = start(model, data, tmp_path / "out", 50.0)
    until_under_way(process, 1)
    begun = time.monotonic()
    for _ in range(sent):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - begun < 20 and "Traceback" not in err
    assert err.count("interrupted") == 1
