"""The stage prompts: what it writes is read by both programs that compare drafters."""

import json
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluate.data import read_dataset
from scripts.bench.drafters import read_prompts
from scripts.nano.prompts import MEDIA, TEXT, write_prompts
from scripts.nano.rows import assistant, user


def write_rows(output: Path, number: int) -> None:
    (output / "rows").mkdir()
    (output / "media").mkdir()
    (output / "media" / "a.wav").write_bytes(b"sound")
    for sense in (*TEXT, *MEDIA):
        media = [] if sense in TEXT else [{"type": "audio", "audio": "../media/a.wav"}]
        lines = []
        for i in range(number):
            messages = [user(*media, f"{sense} {i}?"), assistant(f"It is {i}.")]
            lines.append(json.dumps({"id": f"{sense}.{i}", "sense": sense, "messages": messages}) + "\n")
        (output / "rows" / f"{sense}.test.jsonl").write_text("".join(lines))


def test_prompts_are_of_all_senses_in_turn(tmp_path: Path) -> None:
    write_rows(tmp_path, 3)
    assert write_prompts(tmp_path, 10) == {"text": 10, "media": 10}
    asked = read_prompts(tmp_path / "prompts" / "text.jsonl")
    assert [len(conversation) for conversation in asked] == [1] * 10
    words = [conversation[0]["content"] for conversation in asked]
    assert words[:5] == ["count 0?", "add 0?", "spell 0?", "repeat 0?", "count 1?"]
    text, media = (read_dataset(tmp_path / "prompts" / f"{name}.jsonl") for name in ("text", "media"))
    assert not text.problems and not media.problems and not text.unread and not media.unread
    assert text.samples[4].references == ("It is 1.",) and text.samples[4].category == "count"
    assert {sample.category for sample in media.samples} == {*MEDIA} and media.samples[0].media


def test_prompts_need_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the stage data first"):
        write_prompts(tmp_path, 10)
