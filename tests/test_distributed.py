"""Several real processes over localhost: a model spread over them says what one process says, and none hangs alone."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert import convert_checkpoint
from omni_jax.cli import main
from omni_jax.distributed import start
from omni_jax.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distributed") / "tiny"
    convert_checkpoint(checkpoints("tiny"), directory)
    return directory


def together(processes: int, *flags: str) -> list[subprocess.Popen]:
    """The command in several processes that know of each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    known = ["--distributed", "--coordinator", coordinator, "--processes", str(processes), "--process"]
    command = [sys.executable, "-m", "omni_jax.cli", *flags, *known]
    return [
        subprocess.Popen([*command, str(i)], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(processes)
    ]


def outputs(running: list[subprocess.Popen]) -> list[str]:
    """What each printed, once all have ended well."""
    made = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), made[0][1][-3000:]
    return [out for out, _ in made]


@pytest.mark.slow
def test_two_processes_generate_what_one_does(model: Path, capsys: Any) -> None:
    asked = ["generate", "--model", str(model), "--text", "Say something", "--max-new-tokens", "12", "--json"]
    first, second = outputs(together(2, *asked, "--mesh", "expert=2"))
    main(asked)
    assert json.loads(first)["token_ids"] == json.loads(capsys.readouterr().out)["token_ids"]
    assert second == "", "one process answers"


@pytest.mark.slow
def test_four_processes_evaluate_as_one_does(model: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"id": f"q{i}", "prompt": "word " * (i + 1), "reference": "x"} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ["evaluate", "--model", str(model), "--data", str(tmp_path / "data.jsonl"), "--slots", "2"]
    asked += ["--max-new-tokens", "6", "--json"]
    four = outputs(together(4, *asked, "--output", str(tmp_path / "four"), "--mesh", "expert=2,data=2"))
    main([*asked, "--output", str(tmp_path / "one")])
    capsys.readouterr()
    assert four[1:] == [""] * 3
    assert told(tmp_path / "four") == told(tmp_path / "one") and len(told(tmp_path / "one")) == 5


def told(directory: Path) -> dict[str, Any]:
    """The replies of an evaluation by id."""
    (file,) = directory.glob("results*.jsonl")
    results = [json.loads(line) for line in file.read_text().splitlines()]
    return {result["id"]: [turn["token_ids"] for turn in result["turns"]] for result in results}


@pytest.mark.slow
def test_a_lost_process_ends_the_others_with_an_error(model: Path) -> None:
    asked = ["stream", "--model", str(model), "--text", "Say", "--max-new-tokens", "3000", "--mesh", "expert=2"]
    left, lost = together(2, *asked)
    assert left.stdout is not None and left.stdout.read(1), "it ended before it said anything"
    lost.kill()
    _, complaint = left.communicate(timeout=120)
    assert left.returncode == 1 and "Gloo" in complaint and "failed" in complaint


@pytest.mark.parametrize(
    "stated, complaint",
    [
        (("node:1", 2, None), "process missing"),
        (("node", 2, 0), "HOST:PORT"),
        (("node:1", 2, 2), "numbered from 0"),
    ],
)
def test_wrong_clusters_are_refused(stated: tuple, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        start(*stated)


def test_a_process_that_no_scheduler_started_says_so(tmp_path: Path) -> None:
    # In a process of its own, because it must come before any device is touched.
    command = [
        sys.executable,
        "-m",
        "omni_jax.cli",
        "generate",
        "--model",
        str(tmp_path),
        "--text",
        "Hi",
        "--distributed",
    ]
    ended = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True)
    assert ended.returncode == 3 and "srun or mpirun" in ended.stderr


def test_flags_without_distributed_are_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", str(tmp_path), "--text", "Hi", "--processes", "2"])
    assert ended.value.code == 3 and "need --distributed" in capsys.readouterr().err
