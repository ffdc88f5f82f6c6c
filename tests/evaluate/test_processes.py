"""Two real processes share one evaluation, with a model each or one for both; one is killed, a rerun completes it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import convert
from omni_jax import cli
from omni_jax.evaluate.stored import read_all
from omni_jax.omni import Omni
from scripts.small.quick import QUICK_FLAGS
from tests.parity import user

# One process of the command. With a number it dies before it writes so many results.
WORKER = """
import os, signal, sys
from omni_jax import cli, distributed
from omni_jax.evaluate import run
port, process, dies, *asked = sys.argv[1:]
distributed.LOST_SECONDS, distributed.LEAVE_SECONDS = 10, 1
add, count = run.Results.add, 0
def dying(self, result):
    global count
    count += 1
    if count == int(dies):
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, result)
run.Results.add = dying
cli.main([*asked, "--distributed", "--coordinator", f"localhost:{port}", "--processes", "2", "--process", process])
"""
TEXTS = [f"Question {'and ' * n}{n}?" for n in range(7)]


@pytest.fixture(scope="module")
def asked(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, but for its output."""
    directory = tmp_path_factory.mktemp("processes")
    convert.convert_checkpoint(checkpoints("small"), directory / "small", progress=False)
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": text, "reference": "x"}) + "\n" for text in TEXTS))
    command = ["evaluate", "--model", str(directory / "small"), "--data", str(data)]
    return [*command, "--max-new-tokens", "4", "--slots", "2", "--json"]


def run(asked: list[str], dies: tuple[int, int] = (0, 0)) -> tuple[list[int], list[str]]:
    """Exit status and standard output of each of two processes, those of which die that have a number."""
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": QUICK_FLAGS}
    workers = []
    for process, result in enumerate(dies):
        command = [sys.executable, "-c", WORKER, str(port), str(process), str(result), *asked]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        workers.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    try:
        told = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    status = [worker.returncode for worker in workers]
    assert any(dies) or status == [0, 0], told
    return status, [out for out, _ in told]


@pytest.mark.slow
def test_two_processes_share_the_samples(asked: list[str], omnis: Callable[[str], Omni], tmp_path: Path) -> None:
    asked = [*asked, "--output", str(tmp_path)]
    (first, second), _ = run(asked, dies=(0, 2))
    # The first one has done its share, and does not wait for ever.
    assert first != 0 and second == -9
    before = {result["id"]: result for result in read_all(tmp_path)}
    assert len(before) == 5 and not (tmp_path / "report.md").exists()

    _, said = run(asked)
    assert json.loads(said[0])["scored"] == len(TEXTS)
    assert said[1] == "", "the first speaks for all"
    after = read_all(tmp_path)
    assert sorted(result["id"] for result in after) == [f"#{i}" for i in range(len(TEXTS))]
    for result in after:
        assert before.get(result["id"], result) == result
        want = omnis("small").generate(user(TEXTS[int(result["id"][1:])]), max_new_tokens=4).token_ids
        assert result["turns"][0]["token_ids"] == want


@pytest.mark.slow
def test_a_shared_model_loses_any_of_its_processes(asked: list[str], tmp_path: Path, capsys: Any) -> None:
    """First the second process is killed, then the first, which writes and has brought them together."""
    shared = [*asked, "--output", str(tmp_path / "killed"), "--mesh", "expert=2"]
    file, kept = tmp_path / "killed" / "results-00000.jsonl", b""
    for dies in ((0, 2), (2, 0)):
        killed = dies.index(2)
        status, said = run(shared, dies)
        assert status[killed] == -9 and status[1 - killed] != 0 and said == ["", ""]
        written = file.read_bytes()
        assert written.startswith(kept) and written.endswith(b"\n")
        assert 1 <= written.count(b"\n") - kept.count(b"\n") <= 2
        kept = written
    _, said = run(shared)
    assert file.read_bytes().startswith(kept) and [path.name for path in file.parent.glob("*.jsonl")] == [file.name]
    cli.main([*asked, "--output", str(tmp_path / "whole")])
    assert said == [capsys.readouterr().out, ""]
    for name in ("report.md", "summary.json", "run.json"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    killed, whole = ({one["id"]: _ids(one) for one in read_all(tmp_path / name)} for name in ("killed", "whole"))
    assert killed == whole and len(whole) == len(TEXTS)


def _ids(result: dict[str, Any]) -> list[list[int]]:
    return [turn["token_ids"] for turn in result["turns"]]
