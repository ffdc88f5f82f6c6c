"""Rows from files as people have them, and the bounds within which they are read."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate.data import Sample, read_dataset
from omni_jax.rows import files as rows_module

ROWS = [{"prompt": "Grüße, 你好"}, {"prompt": "b", "reference": "é"}]


def texts(path: Path) -> list[str]:
    return [sample.messages[0]["content"] for sample in read_dataset(path).samples]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
def test_encodings(name: str, encoding: str, tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = f"[{','.join(lines)}]" if name.endswith(".json") else "\r\n".join([*lines, "", ""])
    data = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    dataset = read_dataset(tmp_path / name)
    assert texts(tmp_path / name) == [row["prompt"] for row in ROWS] and not dataset.problems
    assert dataset.samples[1].references == ("é",)


def test_a_line_in_another_encoding_is_that_lines_problem(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n{"prompt": "b"}\n')
    dataset = read_dataset(tmp_path / "rows.jsonl")
    assert [sample.id for sample in dataset.samples] == ["#0", "#2"]
    assert "save the file as UTF-8" in dataset.problems[0].why


def test_a_name_that_occurs_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "answer": 1, "answer": 2}\n')
    assert "'answer' occurs twice" in read_dataset(tmp_path / "rows.jsonl").problems[0].why


def test_homes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert texts(Path("~/rows.jsonl")) == ["a"] and len(read_dataset("~/rows.jsonl").samples) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_an_end_is_not_read_to_the_end(packed: bool, tmp_path: Path) -> None:
    """A gigabyte of one line, packed or sparse, in little memory."""
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    if packed:
        with gzip.open(path, "wb", 1) as file:
            for _ in range(100):
                file.write(bytes(10_000_000))
    else:
        path.touch()
        os.truncate(path, 1_000_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"{path.name}:1 is longer than 64,000,000 bytes; write one row per line"):
            read_dataset(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' * 3)
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a"}] * 3))
    for name, value, file, why in (
        ("MAX_LINES", 2, "rows.jsonl", "has more than 2 lines; split it, and use its parts"),
        ("MAX_LINES", 2, "rows.json", "has more than 2 rows; split it, and use its parts"),
        ("MAX_BYTES", 40, "rows.jsonl", "unpacks to more than 40 bytes; split it"),
        ("MAX_ROW_BYTES", 10, "rows.jsonl", "rows.jsonl:1 is longer than 10 bytes"),
        ("MAX_WHOLE_BYTES", 10, "rows.json", "more than 10 bytes"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(rows_module, name, value)
            with pytest.raises(InputError, match=why):
                read_dataset(tmp_path / file)
            assert name != "MAX_LINES" or len(read_dataset(tmp_path / file, limit=2).samples) == 2
    assert len(read_dataset(path).samples) == 3
    path.write_text("\n" * 3 + '{"prompt": "a"}\n')
    monkeypatch.setattr(rows_module, "MAX_LINES", 2)
    with pytest.raises(InputError, match="has more than 2 lines"):
        read_dataset(path)


def test_a_table_that_unpacks_to_much_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"prompt": ["a" * 1000] * 1000})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        assert len(read_dataset(tmp_path / name).samples) == 1000
        with monkeypatch.context() as patched:
            patched.setattr(rows_module, "MAX_BYTES", 500_000)
            with pytest.raises(InputError, match=rf"{name} unpacks to more than 500,000 bytes"):
                read_dataset(tmp_path / name)
            if name == "rows.parquet":
                assert len(read_dataset(tmp_path / name, limit=64).samples) == 64


@pytest.mark.parametrize("path", ["fifo.jsonl", "/dev/zero", "zero.jsonl"])
def test_what_is_no_file(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is not a regular file; write its rows into a file"):
        read_dataset(tmp_path / path)
    with pytest.raises(InputError, match="has no data files"):
        read_dataset(tmp_path)


def test_whatever_a_row_raises_is_its_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_jax.evaluate import data

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    read_row = data.read_row

    def fail(row: dict, *more: object) -> Sample:
        if row["prompt"] == "a":
            raise AttributeError("'int' object has no attribute 'x'")
        return read_row(row, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(data, "read_row", fail)
    dataset = read_dataset(tmp_path / "rows.jsonl")
    assert len(dataset.samples) == 1 and "no attribute 'x' (AttributeError); repair the row" in dataset.problems[0].why


def test_what_is_no_data_in_a_directory(tmp_path: Path) -> None:
    row = '{"prompt": "a"}\n'
    data = ("train.jsonl", "more/results-x.jsonl", "other/results-00000.jsonl")
    hidden = ("._train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", "more/.cache/deep/a.jsonl")
    results = ("out/results-00000.jsonl", "out/eagle/results-00001.jsonl", "results-00000.jsonl")
    for name in (*data, *hidden, *results):
        (tmp_path / ".set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".set" / name).write_text(row)
    for folder in ("out", "out/eagle", "."):
        (tmp_path / ".set" / folder / "run.json").write_text("{}")
    found = rows_module.data_files(tmp_path / ".set", None)
    assert {str(file.relative_to(tmp_path / ".set")) for file in found} == set(data)


@pytest.mark.parametrize("name, dictionary", [("rows.parquet", True), ("rows.parquet", False), ("rows.arrow", False)])
def test_a_small_table_of_long_rows_takes_little_memory(name: str, dictionary: bool, tmp_path: Path) -> None:
    """Rows of 70 MB, of which a dictionary holds one for all."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"prompt": ["a" * 70_000_000] * 6})
    if name == "rows.parquet":
        parquet.write_table(table, tmp_path / name, compression="zstd", use_dictionary=dictionary)
        assert (tmp_path / name).stat().st_size < 100_000
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as file:
            file.write_table(table)
    del table
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        with pytest.raises(InputError, match=rf"{name}:1 is longer than 64,000,000 bytes; .*files of their own"):
            read_dataset(tmp_path / name)
        assert pool.max_memory() < 300_000_000
    finally:
        pa.set_memory_pool(usual)


def test_long_rows_of_a_table_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"prompt": ["a" * 9] * 99 + ["b" * 2000] + ["c"]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=30)
    monkeypatch.setattr(rows_module, "MAX_DECODED", 700)
    assert len(read_dataset(tmp_path / "rows.parquet").samples) == 101
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 1000)
    with pytest.raises(InputError, match=r"rows\.parquet:100 is longer than 1,000 bytes"):
        read_dataset(tmp_path / "rows.parquet")
    parquet.write_table(pa.table({"prompt": ["a", "b" * 5000]}), tmp_path / "rows.parquet", row_group_size=1)
    with pytest.raises(InputError, match=r"rows\.parquet:2 is longer than 1,000 bytes"):
        read_dataset(tmp_path / "rows.parquet")


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a/x/rows.jsonl", "b/x/rows.jsonl", "b/y/rows.jsonl", "b/other.jsonl")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    named = ["a/x/rows.jsonl:1", "b/x/rows.jsonl:1", "y/rows.jsonl:1", "other.jsonl:1"]
    assert [where for where, *_ in rows_module.rows_of(files)] == named
    assert [where for where, *_ in rows_module.rows_of([files[0], files[0]])] == 2 * ["rows.jsonl:1"]
