"""The steps of training: the same from the same seed, resumed at any of them, in worker processes and without."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.train.data import stream as stream_module
from omni_jax.train.data.plan import Packing
from omni_jax.train.data.samples import TextRecipe
from omni_jax.train.data.stream import Step, Stream, open_stream
from omni_jax.train.data.survey import CHUNK, survey
from omni_jax.train.data.text import text_batch
from omni_jax.train.data.workers import Workers, result_of
from tests.helpers.datasets import write
from tests.train.data import asked

PACKING = Packing(rows=2, width=300, window=16)


def row(i: int, words: int = 3) -> dict[str, Any]:
    reply = " ".join(f"w{i}" for _ in range(words))
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": reply}]}


@pytest.fixture
def data(tmp_path: Path, data_dir: Path) -> Path:
    """Forty short conversations, some with a picture, in a file; line 7 is broken."""
    (tmp_path / "a.png").write_bytes((data_dir / "chelsea.png").read_bytes())
    rows: list[Any] = [row(i, 1 + i % 9) | ({"images": ["a.png"]} if i % 10 == 3 else {}) for i in range(40)]
    return write(tmp_path / "rows.jsonl", *rows[:6], '{"messages": [', *rows[6:])


@pytest.fixture
def opened(recipe: TextRecipe) -> Iterator[Any]:
    """`opened(path, ...)` is a stream, closed at the end."""
    streams: list[Stream] = []

    def open_it(*paths: Path, packing: Packing = PACKING, **settings: Any) -> Stream:
        streams.append(open_stream(paths, recipe, text_batch, packing, **settings))
        return streams[-1]

    yield open_it
    for one in streams:
        one.close()


def same(ours: list[Step], theirs: list[Step]) -> bool:
    """Whether steps are equal bit for bit."""
    if [(s.samples, s.tokens) for s in ours] != [(s.samples, s.tokens) for s in theirs]:
        return False
    leaves = [(jax.tree.leaves(a.batch), jax.tree.leaves(b.batch)) for a, b in zip(ours, theirs, strict=True)]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for a, b in leaves for x, y in zip(a, b, strict=True))


def test_every_row_once_in_an_epoch(data: Path, opened: Any) -> None:
    stream = opened(data, epochs=2)
    steps = list(stream)
    assert len(steps) == stream.steps and not list(stream)
    epoch = stream.plan.start_of(1)
    named = sorted(f"rows.jsonl:{i}" for i in range(1, 42) if i != 7)
    for part in (steps[:epoch], steps[epoch:]):
        assert sorted(name for step in part for name in step.samples) == named
    assert {step.batch.token_ids.shape[0] for step in steps} == {2}
    assert [(p.where, "no valid JSON" in p.why) for p in stream.problems] == [("rows.jsonl:7", True)]
    assert [s.samples for s in steps[:epoch]] != [s.samples for s in steps[epoch:]]
    assert same(steps, list(opened(data, epochs=2))) and not same(steps, list(opened(data, epochs=2, seed=1)))


@pytest.mark.parametrize("packing", [PACKING, Packing(3, 300, several=False)], ids=["packed", "alone"])
def test_a_stream_goes_on_from_any_step(data: Path, recipe: TextRecipe, packing: Packing) -> None:
    workers = Workers(recipe, 0)
    found = survey([data], workers)

    def stream() -> Stream:
        return Stream(found, workers, text_batch, packing, epochs=2)

    whole = list(stream())
    for stop in [*range(0, len(whole), 3), len(whole)]:
        before, after = stream(), stream()
        steps: Any = iter(before)
        begun = [next(steps) for _ in range(stop)]
        steps.close()
        after.restore(json.loads(json.dumps(before.state())))
        assert same(begun + list(after), whole)
        assert before.state()["step"] == stop and after.state()["step"] == len(whole)


def test_workers_change_nothing(data: Path, opened: Any) -> None:
    whole = list(opened(data, epochs=3))
    first, second = opened(data, epochs=3, workers=2), opened(data, epochs=3, workers=1)
    steps = iter(first)
    begun = [next(steps) for _ in range(len(whole) // 2)]
    second.restore(first.state())
    assert same(begun + list(second), whole) and same(begun + list(steps), whole)
    assert [p.where for p in first.problems] == ["rows.jsonl:7"]


def test_epochs_without_an_end(data: Path, opened: Any) -> None:
    stream = opened(data, epochs=None)
    steps: Any = iter(stream)
    assert stream.steps is None and stream.epoch == 0
    for _ in range(stream.plan.start_of(2)):
        next(steps)
    assert stream.epoch == 2
    steps.close()
    again = opened(data, epochs=None)
    again.restore(stream.state())
    assert same([next(iter(stream))], [next(iter(again))])


def test_another_datasets_state(data: Path, opened: Any, tmp_path: Path) -> None:
    stream = opened(data)
    for name, value, settings, remedy in (
        ("seed", 1, {"seed": 1}, "the same data"),
        ("rows", 3, {"packing": Packing(3, 300, window=16)}, "a mesh that divides as many rows"),
    ):
        with pytest.raises(InputError, match=rf"begun with {name} {value}, and this is .*; resume it with {remedy}"):
            stream.restore(opened(data, **settings).state())
    other = write(tmp_path / "other.jsonl", *(row(i) for i in range(40)))
    for ours, theirs in ((stream, [other]), (opened(data, data), [data, other])):
        with pytest.raises(InputError, match="begun with data '"):
            ours.restore(opened(*theirs).state())
    assert stream.state()["step"] == 0


def test_what_is_wrong_with_data(opened: Any, tmp_path: Path) -> None:
    good, bad = row(1), {"messages": [{"role": "wizard", "content": "q"}]}
    for name, rows, settings, why in (
        ("empty", [], {}, "empty.jsonl: no row can be used$"),
        ("blank", ["", ""], {}, "blank.jsonl: no row can be used$"),
        ("bad", [bad] * 12, {}, r"(?s)no row can be used\n  bad.jsonl:1: message 0 has the role 'wizard'.*and 2 more$"),
        ("masked", [{"messages": good["messages"][:1]}], {}, "masked.jsonl:1: no token of the row is learned"),
        ("line", [good] * 6 + ['{"messages": ['] + [good], {"strict": True}, "^line.jsonl:7: the line: no valid JSON"),
        ("strict", [good, bad], {"strict": True}, "^strict.jsonl:2: message 0 has the role 'wizard'"),
        ("media", [good | {"images": ["no.png"]}], {"strict": True}, "^media.jsonl:1: .*no.png does not exist"),
        ("column", [good | {"imges": ["a.png"]}], {"strict": True}, "the column 'imges' is not read; write 'images'"),
        ("long", [row(1, 500)], {}, r"long.jsonl:1: the row has \d+ tokens, more than max_length 300"),
        ("list", ["[1]"], {}, "list.jsonl:1: the row is of type list"),
        ("none", None, {}, "none.jsonl does not exist"),
    ):
        path = tmp_path / f"{name}.jsonl"
        if rows is not None:
            write(path, *rows)
        with pytest.raises(InputError, match=why):
            opened(path, **settings)


def test_columns_that_are_not_read_are_told(opened: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    opened(write(tmp_path / "rows.jsonl", row(0) | {"topic": "x"}, row(1) | {"score": 3, "id": 1}))
    assert "columns that are not read: score, topic\n" in capsys.readouterr().err


def test_a_line_without_an_end(opened: Any, tmp_path: Path) -> None:
    (tmp_path / "huge.jsonl").touch()
    os.truncate(tmp_path / "huge.jsonl", 10**9)
    with pytest.raises(InputError, match="huge.jsonl:1 is longer than 64,000,000 bytes"):
        opened(tmp_path / "huge.jsonl")


def test_a_medium_that_is_lost_while_training(data: Path, opened: Any, capsys: pytest.CaptureFixture) -> None:
    streams = opened(data), opened(data, strict=False), opened(data)
    streams[2]._strict = True
    (data.parent / "a.png").write_bytes(b"no picture")
    steps = list(streams[0])
    assert sum(len(step.samples) for step in steps) == 36 and len(streams[0].problems) == 5
    said = capsys.readouterr().err
    assert (
        "1 rows are left out:\n  rows.jsonl:7: the line: no valid JSON" in said and "is without\n  rows.jsonl:" in said
    )
    with pytest.raises(InputError, match=r"rows.jsonl:\d+: .*a.png"):
        list(streams[2])


def test_media_that_are_gone_end_a_run(data_dir: Path, opened: Any, tmp_path: Path) -> None:
    """Else it would be at its end within seconds, or pass over batches for ever where epochs have no end."""
    (tmp_path / "a.png").write_bytes((data_dir / "chelsea.png").read_bytes())
    data = write(tmp_path / "rows.jsonl", *(row(i) | {"images": ["a.png"]} for i in range(3)))
    streams = [opened(data, epochs=epochs, packing=Packing(1, 300, several=False)) for epochs in (None, 9, 2)]
    (tmp_path / "a.png").unlink()
    for stream in streams[:2]:
        with pytest.raises(InputError, match="nothing of 8 batches one after the other can be used; make the media"):
            next(iter(stream))
    assert not list(streams[2])


def test_files_of_several_kinds(opened: Any, tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.json").write_text(json.dumps([row(0), row(1)]))
    parquet.write_table(pa.Table.from_pylist([row(2), row(3)]), tmp_path / "b.parquet")
    write(tmp_path / "c.jsonl", {"text": "plain words"}, {"conversations": [{"from": "human", "value": "q"},
                                                                           {"from": "gpt", "value": "a"}]})  # fmt: skip
    (step,) = opened(*(tmp_path / name for name in ("a.json", "b.parquet", "c.jsonl")))
    assert sorted(step.samples) == [f"{name}:{i}" for name in ("a.json", "b.parquet", "c.jsonl") for i in (1, 2)]


def test_many_chunks_of_rows(opened: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *(row(i, 1) for i in range(3 * CHUNK + 1)))
    plain, helped = (opened(path, packing=Packing(8, 300), workers=n) for n in (0, 1))
    assert plain.state() == helped.state() and plain.plan.lengths.tolist() == helped.plan.lengths.tolist()


def test_a_full_disk(opened: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_jax.train.data.spool.tempfile.TemporaryFile", lambda **_: open("/dev/full", "wb", 0))  # noqa: SIM115
    with pytest.raises(InputError, match="samples cannot be kept in .*no space left.*; make room, or let TMPDIR"):
        opened(data)


def test_workers_import_no_jax_and_their_death_is_told(
    data: Path, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    stream = opened(data, workers=1)
    next(iter(stream))
    assert result_of(stream._workers.submit(asked.blas_threads)) == "1"
    known = result_of(stream._workers.submit(asked.modules))
    assert (
        "omni_jax.train.data.samples" in known
        and not {"omni_jax.train.data.stream", "jax", "jaxlib", "flax", "grain"} & known
    )
    for _ in range(2):
        with pytest.raises(InputError, match="a process that prepares data was killed; memory may have run out"):
            result_of(stream._workers.submit(asked.die))


def test_workers_go_with_their_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from omni_jax.train.data.workers import Workers, result_of\n"
        "from tests.train.data import asked\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(None, 1)\n"
        "    print(result_of(workers.submit(asked.process_id)), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "run.py").write_text(code)
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])})  # fmt: skip
    assert run.stdout is not None
    worker = int(run.stdout.readline())
    assert worker != run.pid and _alive(worker)
    run.kill()
    run.wait()
    for _ in range(100):
        if not _alive(worker):
            return
        time.sleep(0.1)
    raise AssertionError("the worker is left")


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Counted:
    """A recipe of another kind: rows of numbers, whose batch is their sum."""

    from omni_jax.train.data.forms import COLUMNS as columns

    def samples(self, row: dict, folder: Path, where: str) -> list[Any]:
        return [Numbers(row["text"], where, len(row["text"]))]

    def collate(self, rows: Any, count: int, width: int) -> Any:
        flat = [sample for one in rows for sample in one]
        return Sum("".join(s.text for s in flat), np.ones(1, bool), [s.where for s in flat], [], count * width)


class Numbers:
    def __init__(self, text: str, where: str, length: int):
        self.text, self.where, self.length = text, where, length


class Sum:
    def __init__(self, text: str, learned: np.ndarray, samples: list[str], problems: list, tokens: int):
        self.text, self.learned, self.samples, self.problems, self.tokens = text, learned, samples, problems, tokens


def test_a_recipe_of_another_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "ab"}, {"text": "c"})
    stream = open_stream([path], Counted(), lambda made: made.text, Packing(1, 16))
    (step,) = stream
    assert sorted(step.batch) == ["a", "b", "c"] and step.tokens == 16
    stream.close()


def test_a_worker_prepares_while_training_runs(data: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches after the one that is asked for are under way before they are asked for."""
    stream, begun = opened(data, workers=1), []
    submit = stream._workers.submit

    def noted(act: Any, *arguments: Any) -> Any:
        begun.append(act)
        return submit(act, *arguments)

    monkeypatch.setattr(stream._workers, "submit", noted)
    steps: Any = iter(stream)
    next(steps)
    for _ in range(100):
        if len(begun) >= 1 + stream_module.AHEAD:
            break
        time.sleep(0.05)
    assert len(begun) >= 1 + stream_module.AHEAD
    steps.close()
