"""Several real processes over localhost: a model spread over them says what one process says, and none hangs alone."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert import convert_checkpoint
from omni_jax import distributed
from omni_jax.cli import main
from omni_jax.distributed import start
from omni_jax.errors import InputError
from omni_jax.omni import Omni
from tests.helpers.processes import ENVIRONMENT, flags


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distributed") / "tiny"
    convert_checkpoint(checkpoints("tiny"), directory)
    return directory


def begin(*asked: str) -> subprocess.Popen:
    """A Python process."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *asked], env=ENVIRONMENT, text=True, **pipes)


def together(processes: int, *asked: str) -> list[subprocess.Popen]:
    """The command in several processes that know of each other."""
    return [begin("-m", "omni_jax.cli", *asked, *known) for known in flags(processes)]


def outputs(running: list[subprocess.Popen]) -> list[str]:
    """What each printed, once all have ended well."""
    made = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), made[0][1][-3000:]
    return [out for out, _ in made]


@pytest.mark.slow
def test_two_processes_generate_what_one_does(model: Path, capsys: Any) -> None:
    """Without a mesh the automatic one has devices of both."""
    asked = ["generate", "--model", str(model), "--text", "Say something", "--max-new-tokens", "12", "--json"]
    running = together(2, *asked)
    (first, told), (second, hidden) = (process.communicate(timeout=300) for process in running)
    assert [process.returncode for process in running] == [0, 0], told[-3000:]
    main(asked)
    assert json.loads(first)["token_ids"] == json.loads(capsys.readouterr().out)["token_ids"]
    assert second == "", "one process answers"
    assert "mesh data=2: the model over 1 device" in told and "mesh" not in hidden


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_without_devices_is_refused(model: Path) -> None:
    running = together(2, "generate", "--model", str(model), "--text", "Hi", "--mesh", "data=1")
    for process in running:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 3 and "leaves process 1 without any; let it take all, as data=2 does" in told
        assert "    @     0x" not in told, "aborted"


@pytest.mark.slow
def test_a_process_that_gives_up_says_why_at_once(model: Path, tmp_path: Path) -> None:
    asked = ["-m", "omni_jax.cli", "generate", "--model", str(model)]
    first, second = flags(2)
    other = begin(*asked, "--text", "Hi", "--mesh", "expert=2", *first)
    wrong = begin(*asked, "--messages", str(tmp_path / "none.json"), *second)
    _, told = wrong.communicate(timeout=120)
    assert wrong.returncode == 3 and "none.json: there is no such file" in told and "    @     0x" not in told
    assert other.communicate(timeout=60) and other.returncode != 0


# Each process writes the logits that it reads to a file of its own.
LOGITS = """
import sys
import numpy as np
import omni_jax
from omni_jax import distributed
model, coordinator, process, path = sys.argv[1:]
distributed.start(coordinator, 2, int(process))
omni = omni_jax.load(model, mesh="expert=2", parts=("thinker",))
batch = omni.prepare([[{"role": "user", "content": text}] for text in ("Say", "Say something")])
np.save(path, np.asarray(omni.logits(batch))[batch.mask])
"""


@pytest.mark.slow
def test_every_process_reads_all_logits(model: Path, omnis: Callable[[str], Omni], tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{i}.npy") for i in range(2)]
    running = [begin("-c", LOGITS, str(model), known[2], str(i), paths[i]) for i, known in enumerate(flags(2))]
    outputs(running)
    batch = omnis("tiny").prepare([[{"role": "user", "content": text}] for text in ("Say", "Say something")])
    want = np.asarray(omnis("tiny").logits(batch))[batch.mask]
    for path in paths:
        np.testing.assert_allclose(np.load(path), want, atol=5e-4, rtol=0)


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


def test_processes_meet_before_they_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU, those that come to their first collective 30 seconds apart do not connect any more."""
    done = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **waits: done.append(waits))
    monkeypatch.setattr(distributed, "barrier", done.append)
    with socket.create_server(("127.0.0.1", 0)) as first:
        start(f"127.0.0.1:{first.getsockname()[1]}", 2, 1)
    assert done[0]["initialization_timeout"] >= 300 and done[1:] == ["joined"]


def test_a_first_process_that_never_comes_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "START_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(InputError, match=f"nobody listens at 127.0.0.1:{port} .*; start process 0 in time"):
        start(f"127.0.0.1:{port}", 2, 1)


def test_a_port_that_an_earlier_run_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX would take it too, and processes of both runs would meet each other."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **waits: None)
    with socket.socket() as earlier:
        earlier.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        earlier.bind(("", 0))
        earlier.listen()
        port = earlier.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of the coordinator cannot be used .*; an earlier run"):
            start(f"127.0.0.1:{port}", 2, 0)
        start(f"127.0.0.1:{port}", 2, 1)
    start(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    "stated, complaint",
    [
        (("node:1", 2, None), "process missing"),
        (("node", 2, 0), "HOST:PORT"),
        (("node:65536", 2, 0), "HOST:PORT"),
        (("node:1", 2, 2), "numbered from 0"),
    ],
)
def test_wrong_clusters_are_refused(stated: tuple, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        start(*stated)


def test_a_process_that_no_scheduler_started_says_so(tmp_path: Path) -> None:
    # In a process of its own, because it must come before any device is touched.
    command = [sys.executable, "-m", "omni_jax.cli", "generate", "--model", str(tmp_path), "--text", "Hi"]
    ended = subprocess.run([*command, "--distributed"], env=ENVIRONMENT, text=True, capture_output=True)
    assert ended.returncode == 3 and "srun or mpirun, or in Kubernetes" in ended.stderr


class Refused(Exception):
    """What a client library may raise."""


@pytest.mark.parametrize("error", [Refused, OSError, RuntimeError])
def test_schedulers_that_do_not_answer_are_told_of(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(*args: object, **waits: object) -> None:
        raise error("the service account may not read pods")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="did not come together: the service account may not read pods"):
        start()


def test_flags_without_distributed_are_refused(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", str(tmp_path), "--text", "Hi", "--processes", "2"])
    assert ended.value.code == 3 and "need --distributed" in capsys.readouterr().err
