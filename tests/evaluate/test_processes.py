"""Two real processes, each with a model of its own, share one evaluation; one is killed, and the rerun completes it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import convert
from omni_jax.evaluate.run import read_all
from omni_jax.omni import Omni
from tests.parity import user

# One process: joins the others, then runs the command with a model that is wholly its own. With a number it dies before
# it writes so many results.
WORKER = """
import os, signal, sys
import jax
port, process, dies, *asked = sys.argv[1:]
waits = {"initialization_timeout": 60, "heartbeat_timeout_seconds": 10}
jax.distributed.initialize(f"localhost:{port}", 2, int(process), **waits)
from omni_jax import cli
from omni_jax.evaluate import run
add, count = run.Results.add, 0
def dying(self, result):
    global count
    count += 1
    if count == int(dies):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, result)
run.Results.add = dying
cli.main(asked)
"""
TEXTS = [f"Question {'and ' * n}{n}?" for n in range(7)]


def start(process: int, port: int, dies: int, asked: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", WORKER, str(port), str(process), str(dies), *asked]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@pytest.mark.slow
def test_two_processes_share_the_samples(
    checkpoints: Callable[[str], Path], omnis: Callable[[str], Omni], tmp_path: Path
) -> None:
    convert.convert_checkpoint(checkpoints("small"), tmp_path / "small", progress=False)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "reference": "x"}) + "\n" for text in TEXTS))
    asked = ["evaluate", "--model", str(tmp_path / "small"), "--data", str(data), "--output", str(tmp_path / "out")]
    asked += ["--max-new-tokens", "4", "--slots", "2", "--json"]

    port = free_port()
    workers = [start(process, port, dies, asked) for process, dies in enumerate((0, 2))]
    try:
        assert workers[1].wait(timeout=120) == -9
        # The other one has done its share, and does not wait for ever.
        assert workers[0].wait(timeout=120) != 0
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    before = {result["id"]: result for result in read_all(tmp_path / "out")}
    assert len(before) == 5 and not (tmp_path / "out" / "report.md").exists()

    port = free_port()
    workers = [start(process, port, 0, asked) for process in range(2)]
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert json.loads(outputs[0][0].splitlines()[-1])["scored"] == len(TEXTS)
    assert "{" not in outputs[1][0], "the first speaks for all"
    after = read_all(tmp_path / "out")
    assert sorted(result["id"] for result in after) == [f"#{i}" for i in range(len(TEXTS))]
    for result in after:
        assert before.get(result["id"], result) == result
        want = omnis("small").generate(user(TEXTS[int(result["id"][1:])]), max_new_tokens=4).token_ids
        assert result["turns"][0]["token_ids"] == want
