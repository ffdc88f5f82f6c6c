"""Media that rows name: found beside the dataset in every form, read before anything else, known by their bytes."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate import media
from omni_jax.evaluate.data import Sample, read_dataset
from omni_jax.inputs.messages import read_conversation


def read(folder: Path, *parts: Any) -> Sample:
    """The sample of a row with these parts, in a dataset in a folder; InputError if it is left out."""
    row = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]}
    return _read(folder, row)


def _read(folder: Path, row: dict) -> Sample:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return read_dataset(folder / "rows.jsonl").samples[0]


def sources(sample: Sample) -> list[Any]:
    return [medium.source for medium in read_conversation(sample.messages).media]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset's folder, from another one with files of the same names."""
    for name in ("set/a.png", "set/b.wav", "set/c.mp4", "set/12:30.png", "set/note: a.png", "here/a.png", "here/b.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "set"


FORMS = [
    ({"type": "image", "image": "a.png"}, "a.png"),
    ({"type": "image", "path": "a.png"}, "a.png"),
    ({"type": "image", "url": "a.png"}, "a.png"),
    ({"type": "image", "image": None, "path": "a.png", "url": None}, "a.png"),
    ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "a.png"),
    ({"type": "image_url", "image_url": {"url": "a.png"}}, "a.png"),
    ({"type": "image_url", "image_url": "a.png"}, "a.png"),
    ({"type": "audio_url", "audio_url": {"url": "b.wav"}}, "b.wav"),
    ({"type": "video_url", "video_url": {"url": "c.mp4"}}, "c.mp4"),
    ({"type": "image", "image": "file:a.png"}, "a.png"),
    ({"type": "image_url", "image_url": {"url": "file:a.png"}}, "a.png"),
    ({"type": "image", "image": "file:12%3A30.png"}, "12:30.png"),
    ({"type": "image", "image": "12:30.png"}, "12:30.png"),
    ({"type": "image", "image": "note: a.png"}, "note: a.png"),
    ({"type": "image", "image": "../set/a.png"}, "../set/a.png"),
    ({"type": "input_audio", "input_audio": {"data": "file:b.wav", "format": "wav"}}, "b.wav"),
]


@pytest.mark.parametrize("part, name", FORMS, ids=lambda value: str(value)[:60])
def test_every_form_is_relative_to_the_datasets_file(part: dict, name: str, folder: Path) -> None:
    sample = read(folder, part)
    assert sources(sample) == [str(folder / name)] and len(sample.media) == 64


@pytest.mark.parametrize("part", [part for part, _ in FORMS], ids=lambda value: str(value)[:60])
def test_a_file_of_the_same_name_elsewhere_is_not_taken(part: dict, folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(InputError, match="does not exist; paths of media are relative to the dataset's file"):
        read(folder, part)


def test_the_short_form_of_a_row(folder: Path) -> None:
    sample = _read(folder, {"prompt": "?", "image": ["a.png", "12:30.png"], "audio": "b.wav"})
    assert sources(sample) == [str(folder / name) for name in ("a.png", "12:30.png", "b.wav")]


def test_frames_are_found_one_by_one(folder: Path) -> None:
    located, digest = media.Library().locate(
        [{"role": "user", "content": [{"type": "video", "video": ["a.png", "12:30.png"]}]}], folder
    )
    assert located[0]["content"][0]["video"] == [str(folder / "a.png"), str(folder / "12:30.png")] and digest


def test_homes_and_absolute_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent / "here"))
    for source, where in (("~/a.png", "here/a.png"), (str(folder / "a.png"), "set/a.png"),
                          (f"file://{folder}/a.png", "set/a.png")):  # fmt: skip
        assert sources(read(folder, {"type": "image", "image": source})) == [str(folder.parent / where)]


def test_data_and_addresses_are_no_paths(folder: Path) -> None:
    sample = read(folder, {"type": "image", "image": "data:image/png;base64,aGk="})
    assert sources(sample) == [b"hi"] and sample.media == ""
    assert sources(read(folder, {"type": "image", "base64": "aGk="})) == [b"hi"]
    with pytest.raises(InputError, match="nothing is fetched"):
        read(folder, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})


def test_the_digest_is_of_what_the_files_hold(folder: Path) -> None:
    def digest(*names: str) -> str:
        return read(folder, *({"type": "image", "image": name} for name in names)).media

    before = digest("a.png")
    os.utime(folder / "a.png", (0, 0))
    assert digest("a.png") == before != digest("a.png", "a.png")
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    assert digest("copy.png") == before
    assert digest("a.png", "12:30.png") != digest("12:30.png", "a.png")
    (folder / "a.png").write_text("b" * len("set/a.png"))
    assert digest("a.png") != before


def test_a_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_source = [], media.open_source

    def counted(path: Path, kind: str) -> Any:
        opened.append(path)
        return open_source(path, kind)

    monkeypatch.setattr(media, "open_source", counted)
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}", "image": "a.png"}}\n' for i in range(5)))
    assert len(read_dataset(folder / "rows.jsonl").samples) == 5 and opened == [folder / "a.png"]


def test_a_file_that_cannot_be_read_is_every_rows_problem(folder: Path) -> None:
    (folder / "broken.png").symlink_to("/proc/self/mem")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "image": "broken.png"}\n' * 2 + '{"prompt": "b"}\n')
    dataset = read_dataset(folder / "rows.jsonl")
    assert len(dataset.problems) == 2 and all("cannot be read" in problem.why for problem in dataset.problems)


def test_an_error_that_shows_at_the_end_of_reading_is_every_rows_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source = media.open_source

    @contextmanager
    def late(path: Path, kind: str) -> Iterator[Any]:
        with open_source(path, kind) as file:
            yield file
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(media, "open_source", late)
    (folder / "rows.jsonl").write_text('{"prompt": "a", "image": "a.png"}\n' * 2 + '{"prompt": "b"}\n')
    problems = read_dataset(folder / "rows.jsonl").problems
    assert len(problems) == 2 and all("a.png': cannot be read (input/output error)" in one.why for one in problems)


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    os.truncate(folder / "c.mp4", 10**12)
    with pytest.raises(InputError, match=r"c\.mp4: more than 64,000,000,000 bytes"):
        read(folder, {"type": "video", "video": "c.mp4"})


def test_what_cannot_be_a_medium_is_told_before_the_run(folder: Path) -> None:
    for source in (5, 1.5, True, [1, 2]):
        with pytest.raises(InputError, match="give a path or base64"):
            read(folder, {"type": "image", "image": source})
