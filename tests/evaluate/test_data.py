"""Datasets: every form of a row, media relative to their file, and rows that cannot be used."""

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate import data as data_module
from omni_jax.evaluate.data import read_dataset
from tests.helpers.datasets import write

# Lists in lists that the JSON reader still takes, which follows another limit from Python 3.12 on.
DEEP = 900 if sys.version_info < (3, 12) else 1250


def test_the_forms_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    for name in ("a.flac", "b.flac"):
        (tmp_path / "sounds" / name).write_bytes(name.encode())
    said = [
        {"role": "user", "content": [{"type": "audio", "audio": "sounds/a.flac"}, {"type": "text", "text": "Who?"}]}
    ]
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": said, "reference": "me", "id": "x"},
        "",
        {"prompt": "Say.", "system": "Be brief.", "audio": ["sounds/a.flac", "sounds/b.flac"], "references": ["a", 2]},
        {"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]},
        {"prompt": "Which?", "choices": ["red", "blue"], "answer": "b"},
    )
    a, b, c, d = read_dataset(path).samples
    assert a.id == "x" and a.references == ("me",)
    assert a.messages[0]["content"][0] == {"type": "audio", "audio": str(tmp_path / "sounds/a.flac")}
    assert b.id == "#1" and b.references == ("a", "2") and b.messages[0] == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in b.messages[1]["content"]] == ["audio", "audio", "text"]
    assert c.id == "81" and c.category == "writing" and c.turns == ("Two?",)
    assert c.messages == [{"role": "user", "content": "One?"}]
    assert d.choices == ("red", "blue") and d.answer == 1
    answers = [{"prompt": "?", "choices": ["B", "x", "y"], "answer": answer} for answer in (2, "x", "c", "B", "A")]
    assert [s.answer for s in read_dataset(write(tmp_path / "c.jsonl", *answers)).samples] == [2, 1, 2, 0, 0]


@pytest.mark.parametrize(
    "choices, answer, index",
    [
        (["x", "y"], "1", 1),  # as in HellaSwag
        (["0", "4", "2", "1"], 1, 1),  # as in MMLU: texts that look like numbers
        (["0", "4", "2", "1"], "1", 3),
        ([10, 20, 30], 20, 1),
        ([10, 20, 30], 2, 2),
        ([7, 7, 1], 7, "fits several choices"),
        ([0, 1, 2], 1, 1),
        (["x", "y"], 1.5, "'answer' is 1.5"),
        ([0.5, 1.5], 1.5, 1),
        ([1, 2, 3, 4], 3, "'answer' is 3, which fits several choices"),
        ([1, 2, 3, 4], "3", 2),
        (["x", "y"], True, "'answer' is True"),
        (["x", "y"], "2", "'answer' is '2'"),
        (["x", "y"], -1, "'answer' is -1"),
        (["x", "y"], [0], "'answer' is "),
    ],
)
def test_the_answer_among_numbers(choices: list, answer: Any, index: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a"}, {"prompt": "?", "choices": choices, "answer": answer})
    dataset = read_dataset(path)
    if isinstance(index, int):
        assert dataset.samples[1].answer == index
    else:
        assert index in dataset.problems[0].why


@pytest.mark.parametrize(
    "row, why",
    [
        ("{broken", "no valid JSON"),
        ([1], "of type list"),
        ({"reference": "x"}, "no question"),
        ({"prompt": "a", "turns": ["b"]}, "give one of"),
        ({"prompt": ["a", "b"]}, "'prompt' is a list; give 'turns'"),
        ({"turns": ["a", "b"], "reference": ["x"]}, "'reference' is a list of 1 for 2 turns"),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"turns": "one"}, "give a list"),
        ({"messages": [{"role": "user"}]}, "message 0 has no 'content'"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "'boss'"),
        ({"messages": [], "audio": "x"}, "is beside 'messages'"),
        ({"prompt": "a", "audio": "nowhere.wav"}, "nowhere.wav does not exist"),
        ({"prompt": "a", "reference": {"b": 1}}, "holds a dict"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "'answer' is 2"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": "z"}, "'answer' is 'z'"),
        ({"prompt": "a", "id": "1"}, "was used before"),
        ({"prompt": "a", "image": "iVBORw0KGgo" * 99}, "is no path"),
        ({"prompt": "a", "image": "a\0b"}, "null character"),
        ({"prompt": "a", "audio": {"array": [0.1], "path": None, "sampling_rate": 1}}, "'audio' holds ['array', 's"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": {"array": [0.1]}}]}]},
            "give a path, or",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": {}}]}]}, "'image' holds []; give"),
        ({"prompt": "a", "id": "\ud800"}, "no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}]}, "no text"),
        ('{"prompt": ' + "[" * 100_000, "nested too deep"),
        ('{"prompt": "a", "extra": ' + "[" * DEEP + "]" * DEEP + "}", "nested"),
    ],
)
def test_rows_that_cannot_be_used_are_told_with_their_line(row: Any, why: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "id": "1"}, row, {"prompt": "b"})
    dataset = read_dataset(path)
    assert len(dataset.samples) == 2
    (problem,) = dataset.problems
    assert problem.where == "rows.jsonl:2" and why in problem.why


def test_references_of_turns(tmp_path: Path) -> None:
    """FastChat's rows hold one for each turn; the last reply is the one that is scored."""
    forms = ({"reference": ["one", "two"]}, {"reference": "two"}, {"references": ["two", "2"]}, {"references": ["x"]})
    dataset = read_dataset(write(tmp_path / "rows.jsonl", *({"turns": ["a", "b"], **form} for form in forms)))
    assert [sample.references for sample in dataset.samples] == [("two",), ("two",), ("two", "2"), ("x",)]
    dataset = read_dataset(write(tmp_path / "one.jsonl", {"turns": ["a"], "reference": ["one", "two"]}))
    assert dataset.samples[0].references == ("one", "two")
    dataset = read_dataset(write(tmp_path / "none.jsonl", {"turns": ["a", "b"], "reference": ["one", ""]}))
    assert dataset.samples[0].references == (), "no right answer to the second question"


def test_rows_without_an_id_take_no_id_from_others(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "id": 0}, {"prompt": "c", "id": "3"}, {"prompt": "d"}]
    dataset = read_dataset(write(tmp_path / "rows.jsonl", *rows))
    assert [sample.id for sample in dataset.samples] == ["#0", "0", "3", "#3"] and not dataset.problems


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_none(limit: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"limit is {limit}"):
        read_dataset(write(tmp_path / "rows.jsonl", {"prompt": "a"}), limit=limit)


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}]))
    assert len(read_dataset(tmp_path / "rows.json").samples) == 2
    assert len(read_dataset(tmp_path / "rows.json", limit=1).samples) == 1
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write('{"prompt": "packed"}\n')
    assert read_dataset(tmp_path / "rows.jsonl.gz").samples[0].messages[0]["content"] == "packed"
    write(tmp_path / "set" / "test" / "rows.jsonl", {"prompt": "of the test"})
    write(tmp_path / "set" / "train-00000.jsonl", {"prompt": "to train"}, {"prompt": "more"})
    write(tmp_path / "set" / "testmini-00000.jsonl", *[{"prompt": str(i)} for i in range(4)])
    write(tmp_path / "set" / "test.extra.jsonl", *[{"prompt": str(i)} for i in range(8)])
    assert [len(read_dataset(tmp_path / "set", split=split).samples) for split in (None, "test", "train")] == [15, 9, 2]
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes((tmp_path / "rows.jsonl.gz").read_bytes()[:-9])
    for path, split, why in (
        (tmp_path / "none", None, "does not exist"),
        (tmp_path / "set", "dev", "split 'dev'"),
        (write(tmp_path / "rows.txt", "a"), None, "datasets are files of"),
        (write(tmp_path / "bad.jsonl", "{"), None, "no row that can be used"),
        (write(tmp_path / "bad.json", "{"), None, "no valid JSON"),
        (write(tmp_path / "deep.json", "[" * 100_000), None, "nested too deep"),
        (cut, None, "cut.jsonl.gz cannot be read"),
        (write(tmp_path / "plain.jsonl.gz", {"prompt": "a"}), None, "plain.jsonl.gz cannot be read"),
    ):
        with pytest.raises(InputError, match=why):
            read_dataset(path, split=split)


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    one, same = (write(tmp_path / name, {"prompt": "a"}) for name in ("one.jsonl", "same.jsonl"))
    other = write(tmp_path / "other.jsonl", {"prompt": "b"})
    assert read_dataset(one).digest == read_dataset(same).digest != read_dataset(other).digest


def test_tables_hold_messages_and_media(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture = (data_dir / "chelsea.png").read_bytes()
    rows = [
        {"messages": [{"role": "user", "content": "Hi", "name": None}], "prompt": None, "image": None, "answer": None},
        {"messages": None, "prompt": "What?", "image": {"bytes": picture, "path": "gone.png"}, "answer": 1},
    ]
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    with pa.ipc.new_stream(str(tmp_path / "data-00000.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "with_index.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("test-00000-of-00001.parquet", "data-00000.arrow", "with_index.arrow"):
        first, second = read_dataset(tmp_path / name).samples
        assert first.messages == [{"role": "user", "content": "Hi"}]
        assert second.messages[0]["content"][0] == {"type": "image", "image": picture}
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    undecodable = pa.array([b"\xff"]).view(pa.utf8())
    parquet.write_table(pa.table({"prompt": undecodable}), tmp_path / "undecodable.parquet")
    later = pa.table({"prompt": pa.array([2**62], pa.timestamp("ms"))})
    parquet.write_table(later, tmp_path / "later.parquet")
    for name in ("broken", "undecodable", "later"):
        with pytest.raises(InputError, match="cannot be read as a table"):
            read_dataset(tmp_path / f"{name}.parquet")

    def unknown(file: Path) -> None:
        raise pa.ArrowNotImplementedError("a codec")

    monkeypatch.setattr(parquet, "ParquetFile", unknown)
    with pytest.raises(InputError, match="cannot be read as a table .*codec"):
        read_dataset(tmp_path / "test-00000-of-00001.parquet")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_reading_that_takes_a_while_shows_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", *[{"prompt": "a"}] * 3)
    for seconds, stream, shown in ((0, Terminal(), True), (60, Terminal(), False), (0, io.StringIO(), False)):
        monkeypatch.setattr(data_module, "SHOWN_AFTER", seconds)
        monkeypatch.setattr(sys, "stderr", stream)
        assert len(read_dataset(path).samples) == 3
        assert ("reading" in stream.getvalue()) == shown
