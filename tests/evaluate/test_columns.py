"""Columns of rows: none that names a medium, or that is misspelt, is lost without a word."""

from pathlib import Path
from typing import Any

import pytest

from omni_jax.evaluate.data import COLUMNS, read_dataset
from tests.helpers.datasets import write

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("row, why", [
    ({"prompt": "a", "images": ["a.png"]}, "the column 'images' is not read; write 'image', which may be a list"),
    ({"prompt": "a", "audios": ["a.wav"]}, "'audios' is not read; write 'audio', which may be a list"),
    ({"prompt": "a", "videos": "a.mp4"}, "'videos' is not read; write 'video'"),
    ({"prompt": "a", "image_url": "a.png"}, "write 'image'"),
    ({"prompt": "a", "audio_url": {"url": "a.wav"}}, "write 'audio'"),
    ({"prompt": "a", "video_urls": ["a.mp4"]}, "write 'video'"),
    ({"prompt": "a", "image_path": "a.png"}, "write 'image'"),
    ({"prompt": "a", "Image": "a.png"}, "write 'image'"),
    ({"messages": MESSAGES, "images": ["a.png"]}, "'images' is not read; write its part of the messages"),
    ({"prompt": "a", "imgae": "a.png"}, "'imgae' is not read; write 'image' if that is meant, or rename it"),
    ({"prompt": "a", "vidoe": "a.png"}, "write 'video' if"),
    ({"prompt": "a", "refrence": "a"}, "write 'reference' if"),
    ({"prompt": "a", "sytem": "a"}, "write 'system' if"),
    ({"prompt": "a", "choises": ["a"]}, "write 'choices' if"),
    ({"promt": "a"}, "write 'prompt' if"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_columns_that_would_be_lost(row: dict, why: str, tmp_path: Path) -> None:
    dataset = read_dataset(write(tmp_path / "rows.jsonl", {"prompt": "a"}, row))
    (problem,) = dataset.problems
    assert problem.where == "rows.jsonl:2" and why in problem.why


@pytest.mark.parametrize("row", [
    {"prompt": "a", "question": "a", "idx": 7, "audio_id": "x", "split": "test", "subcategory": "b", "rate": 1},
    {"prompt": "a", "image": "a.png", "image_url": "https://example.org/a.png", "images": ["a.png"]},
    {"prompt": "a", "reference": "b", "references_en": "c", "message": "d", "turn": 1},
    {"turns": ["a"], "prompts": 2, "reference": ["a"]},
    {"prompt": "a", "preference": 1},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "image_path": "a.png"},
], ids=str)  # fmt: skip
def test_columns_that_mean_nothing_here(row: dict[str, Any]) -> None:
    known = {"messages", "prompt", "turns", "image", "reference"}
    assert COLUMNS.check(row) == set(row) - known


def test_columns_without_a_value_lose_nothing(tmp_path: Path) -> None:
    row = {"prompt": "a", "images": [], "image_url": "", "imgae": None, "audios": {}}
    dataset = read_dataset(write(tmp_path / "rows.jsonl", row))
    assert len(dataset.samples) == 1 and not dataset.problems and not dataset.unread


def test_columns_that_are_not_read_are_collected(tmp_path: Path) -> None:
    rows = ({"prompt": "a", "licence": 1}, {"prompt": "b", "answer": "c", "licence": 2, "author": "d"})
    assert read_dataset(write(tmp_path / "rows.jsonl", *rows)).unread == ("author", "licence")
