"""Runs that are killed, resumed, refused or shared between processes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate.data import Dataset
from omni_jax.evaluate.processes import Share, share
from omni_jax.evaluate.report import current_results, summary_of, write_report
from omni_jax.evaluate.run import Results
from omni_jax.evaluate.stored import read_all
from omni_jax.rows.row import Problem
from tests.helpers.datasets import ALONE, SAMPLES, result

# Writes results until it is killed, the parent's word on stdin setting the pace.
WRITER = """
import sys
from pathlib import Path
from omni_jax.evaluate.processes import share
from omni_jax.evaluate.run import Results
from tests.helpers.datasets import SAMPLES, result
with Results(Path(sys.argv[1]), {"task": "t"}, share(0, 1, own_model=True)) as written:
    for sample in written.remaining(SAMPLES):
        sys.stdin.readline()
        written.add(result(sample))
        print(sample.id, flush=True)
"""


def test_a_killed_run_goes_on_without_repeating_or_losing_a_sample(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with Results(whole, {"task": "t"}, ALONE) as written:
        for sample in SAMPLES:
            written.add(result(sample))
    directory = tmp_path / "killed"
    command = [sys.executable, "-c", WRITER, str(directory)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    for _ in range(5):
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
    with pytest.raises(InputError, match="written by another run"), Results(directory, {"task": "t"}, ALONE):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    file = directory / "results-00000.jsonl"
    assert len(read_all(directory)) == 5
    # As if it had died while it wrote the sixth, even between the bytes of a character.
    torn = json.dumps(result(SAMPLES[5]), ensure_ascii=False).encode()
    file.write_bytes(file.read_bytes() + torn[: torn.index("ü".encode()) + 1])
    with Results(directory, {"task": "t"}, ALONE) as written:
        assert len(written.held) == 5 and [s.id for s in written.remaining(SAMPLES)] == [s.id for s in SAMPLES[5:]]
        for sample in written.remaining(SAMPLES):
            written.add(result(sample))
    assert file.read_bytes() == (whole / "results-00000.jsonl").read_bytes()
    dataset = Dataset(SAMPLES, [Problem("f:3", "no | JSON")], "0")
    for path in (directory, whole):
        found = current_results(dataset, read_all(path))
        write_report(path, summary_of("t", dataset, found), dataset, found, {"task": "t"})
    assert (directory / "report.md").read_text() == (whole / "report.md").read_text()
    assert (directory / "summary.json").read_text() == (whole / "summary.json").read_text()


def test_a_report_says_what_the_results_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dataset = Dataset(SAMPLES, [Problem("f:3", "no | JSON")], "0")
    held = [*map(result, SAMPLES[:0:-1]), {"id": "0", "category": "a", "scores": {}, "error": "silent"}]
    found = current_results(dataset, held)
    summary = summary_of("t", dataset, found)
    assert (summary["scored"], summary["failed"], summary["rows_skipped"]) == (11, 1, 1)
    assert summary["scores"]["exact"] == pytest.approx(6 / 11)
    assert summary["replies"]["new_tokens"] == sum(range(12)) and summary["categories"]["b"]["samples"] == 6
    assert summary["drafting"]["accepted_length_micro"] == 1.5
    write_report(tmp_path, summary, dataset, found, {"task": "t", "seed": 3})
    report = (tmp_path / "report.md").read_text()
    for words in ("11 of 12 samples", "| exact | 0.5455 |", "no \\| JSON", "sample 0 | silent", "| seed | 3 |"):
        assert words in report
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {"lengths.png", "accepted.png", "categories.png"} and all(name in report for name in plots)


def test_reports_are_of_the_dataset_in_its_order(tmp_path: Path) -> None:
    """Whatever the order in which samples ended, and whatever else the directory holds."""
    failed = [{"id": str(i), "category": "a", "scores": {}, "error": f"wrong {i}"} for i in (1, 0, 11)]
    held = [*failed, *map(result, SAMPLES[10:1:-1])]
    fewer = Dataset(SAMPLES[:4], [], "0")
    found = current_results(fewer, held)
    assert [one["id"] for one in found] == ["0", "1", "2", "3"]
    write_report(tmp_path, summary_of("t", fewer, found), fewer, found, {"task": "t"})
    report = (tmp_path / "report.md").read_text()
    assert "2 failed" in report and report.index("wrong 0") < report.index("wrong 1") and "wrong 11" not in report
    assert list(summary_of("t", fewer, found)["categories"]) == ["a", "b"]


def test_reports_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(SAMPLES, [], "0")
    found = current_results(dataset, map(result, SAMPLES))
    write_report(tmp_path, summary_of("t", dataset, found), dataset, found, {"task": "t"})
    before = {name: (tmp_path / name).read_text() for name in ("report.md", "summary.json")}

    def interrupted(self: Path, *args: str) -> int:
        self.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(OSError, match="full"):
        write_report(tmp_path, summary_of("t", dataset, found[:3]), dataset, found[:3], {"task": "t"})
    assert before == {name: (tmp_path / name).read_text() for name in before}


def test_directories_that_are_refused(tmp_path: Path) -> None:
    with Results(tmp_path / "run", {"task": "t", "seed": 1}, ALONE):
        pass
    with pytest.raises(
        InputError, match=r"holds another run \(seed was 1, is 2; top_k was None, is 3\); .*other versions"
    ):
        Results(tmp_path / "run", {"task": "t", "seed": 2, "top_k": 3}, ALONE).__enter__()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Results(tmp_path / "file", {}, ALONE).__enter__()
    with pytest.raises(InputError, match="cannot be written"):
        Results(Path("/proc/nowhere"), {}, ALONE).__enter__()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results-00000.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"no run\.json"):
        Results(tmp_path / "old", {}, ALONE).__enter__()
    whole = json.dumps(result(SAMPLES[1]))
    (tmp_path / "run" / "results-00000.jsonl").write_text(f'{whole}\n{{"id":\n{whole}\n')
    with pytest.raises(InputError, match=r"results-00000\.jsonl:2 is damaged"):
        Results(tmp_path / "run", {"task": "t", "seed": 1}, ALONE).__enter__()


def test_a_link_that_leads_nowhere_yet_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("deep/run")
    with Results(tmp_path / "link", {}, ALONE) as written:
        written.add(result(SAMPLES[1]))
    assert read_all(tmp_path / "deep" / "run") == [result(SAMPLES[1])]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop cannot be written"):
        Results(tmp_path / "loop", {}, ALONE).__enter__()


def test_processes_share_samples_or_run_all_of_them(tmp_path: Path) -> None:
    own = [share(p, 3, own_model=True) for p in range(3)]
    assert [[s.id for s in part.of(SAMPLES[:7])] for part in own] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    assert [(part.writes, part.reports) for part in own] == [(True, True), (True, False), (True, False)]
    spread = [share(p, 3, own_model=False) for p in range(3)]
    assert all(part.of(SAMPLES) == SAMPLES for part in spread)
    assert [(part.writes, part.reports) for part in spread] == [(True, True), (False, False), (False, False)]
    for part in (*own, Share(0, 0, 1, writes=True, reports=True)):
        with Results(tmp_path, {}, part) as written:
            # Another number of processes goes on with what these have left.
            for sample in written.remaining(SAMPLES)[:2]:
                written.add(result(sample))
    ids = [held["id"] for held in read_all(tmp_path)]
    assert len(ids) == len(set(ids)) == 8
    with Results(tmp_path, {}, spread[1]) as written:
        written.add({"id": "not mine"})
    assert len(read_all(tmp_path)) == 8
