"""Rows that the repository keeps: their media are there, free, and what the senses made."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from scripts.nano import examples
from scripts.nano.examples import KINDS, SENSES, Free, write_rows
from scripts.nano.rows import Sample, Sense, Split, assistant, user
from scripts.nano.sounds import wav
from scripts.nano.voices import RATE, VOICES, Bank

KEPT = Path(__file__).parents[1] / "data" / "nano"


@pytest.mark.parametrize("sense", SENSES)
def test_media_are_there_and_free(sense: str) -> None:
    rows = [json.loads(line) for line in (KEPT / f"{sense}.jsonl").read_text().splitlines()]
    parts = [part for row in rows for part in row["messages"][0]["content"] if part["type"] != "text"]
    files = [KEPT / part[part["type"]] for part in parts]
    assert len(rows) == SENSES[sense] and all(file.is_file() for file in files)
    assert {*files} == {*(KEPT / sense).iterdir()}
    if sense == "digits":
        assert {file.name.split("-")[1] for file in files} == {*KINDS}


def test_a_sound_stays_as_it_is(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 1600).astype(np.float32)

    def make(draw: np.random.Generator, split: Split) -> Sample:
        assert split == "test"
        asked = user({"type": "audio", "audio": "a.wav"}, "Which?")
        return Sample([asked, assistant("The digit is two.")], "two", {"a.wav": wav(wave, RATE)})

    assert write_rows(Sense("digits", make, {"train": 1, "test": 1}), tmp_path, 0) == SENSES["digits"]
    row = json.loads((tmp_path / "digits.jsonl").read_text().splitlines()[3])
    assert row["messages"][0]["content"][0] == {"type": "audio", "audio": "digits/03-a.flac"}
    assert row["messages"][1]["content"] == "The digit is two." and row["answer"] == "two"
    kept, _ = soundfile.read(tmp_path / "digits" / "03-a.flac", dtype="int16")
    assert np.array_equal(kept, soundfile.read(BytesIO(wav(wave, RATE)), dtype="int16")[0])


def test_voices_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "KINDS", ("flite",))
    for voice in (voice for voice in VOICES if voice.split == "test" and voice.kind in ("flite", "kokoro", "espeak")):
        (tmp_path / voice.name).mkdir()
        (tmp_path / voice.name / "1-0.wav").write_bytes(b"")
    draw = np.random.default_rng(0)
    assert {Bank(tmp_path).voice(draw, "test").kind for _ in range(50)} == {"flite", "kokoro", "espeak"}
    assert {Free(tmp_path).voice(draw, "test").kind for _ in range(50)} == {"flite"}
