"""Rows of omni-nano: each made by its number alone, written once, with its media beside it; and the senses of text."""

import json
from itertools import islice
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest

from omni_jax.errors import InputError
from scripts.nano.rows import SPLITS, Sample, Sense, Split, assistant, rows_path, samples, user, write_sense
from scripts.nano.text import (
    REPEATED,
    add,
    count,
    made_up,
    nouns,
    remember,
    repeat,
    spell,
    text_senses,
    trained_on,
    wording,
)
from scripts.nano.words import NOUNS, NUMBERS

KNOWN = {*NUMBERS, *(str(n) for n in range(21))}


def one_file(draw: np.random.Generator, split: Split) -> Sample:
    number = int(draw.integers(100))
    asked = user({"type": "audio", "audio": "clip.wav"}, "Which number?")
    return Sample([asked, assistant(str(number))], str(number), {"clip.wav": bytes([number])})


def test_a_row_depends_on_its_number_alone(tmp_path: Path) -> None:
    few, more = (Sense("one", one_file, {"train": n, "test": 2}) for n in (3, 70))
    write_sense(tmp_path / "few", few, seed=1, workers=1)
    write_sense(tmp_path / "more", more, seed=1, workers=1)
    lines = [rows_path(tmp_path / name, "one", "train").read_text().splitlines() for name in ("few", "more")]
    assert len(lines[1]) == 70 and lines[0] == lines[1][:3]
    for line in lines[1]:
        row = json.loads(line)
        audio = row["messages"][0]["content"][0]["audio"]
        assert (rows_path(tmp_path / "more", "one", "train").parent / audio).read_bytes() == bytes([int(row["answer"])])
    other = [sample.answer for sample in islice(samples(few, "train", seed=2), 20)]
    assert other != [sample.answer for sample in islice(samples(few, "train", seed=1), 20)]


def test_a_sense_that_is_there_is_left_alone(tmp_path: Path) -> None:
    sense = Sense("one", one_file, {"train": 2, "test": 2})
    write_sense(tmp_path, sense, seed=1, workers=1)
    rows_path(tmp_path, "one", "test").unlink()
    rows_path(tmp_path, "one", "train").write_text("kept\nkept\n")
    write_sense(tmp_path, sense, seed=1, workers=1)
    assert rows_path(tmp_path, "one", "train").read_text() == "kept\nkept\n"
    assert len(rows_path(tmp_path, "one", "test").read_text().splitlines()) == 2


def test_other_numbers_of_rows_are_refused(tmp_path: Path) -> None:
    write_sense(tmp_path, Sense("one", one_file, {"train": 2, "test": 2}), seed=1, workers=1)
    with pytest.raises(InputError, match="one.train.jsonl holds 2 rows, not 1,000; delete it, or give the --scale"):
        write_sense(tmp_path, Sense("one", one_file, {"train": 1000, "test": 2}), seed=1, workers=1)


def test_rows_of_another_seed_are_refused(tmp_path: Path) -> None:
    sense = Sense("one", one_file, {"train": 2, "test": 2})
    write_sense(tmp_path, sense, seed=1, workers=1)
    rows_path(tmp_path, "one", "test").unlink()
    with pytest.raises(InputError, match="one.train.jsonl is outdated: seed changed from 1 to 2; delete .*one.train"):
        write_sense(tmp_path, sense, seed=2, workers=1)
    rows_path(tmp_path, "one", "train").unlink()
    write_sense(tmp_path, sense, seed=2, workers=1)
    with pytest.raises(InputError, match="from 2 to 1; delete .*one.train.jsonl and .*one.test.jsonl to make it anew"):
        write_sense(tmp_path, sense, seed=1, workers=1)


@pytest.mark.parametrize("sense", text_senses(), ids=lambda sense: sense.name)
def test_no_answer_of_the_test_is_trained_on(sense: Sense) -> None:
    """The answers name what is held out: pairs of numbers, nouns, and words that are repeated together."""
    train, test = (list(islice(samples(sense, split, 0), n)) for split, n in (("train", 16_000), ("test", 300)))
    said = [{sample.messages[-1]["content"] for sample in rows} for rows in (train, test)]
    assert not said[0] & said[1] and len(said[1]) > 10
    for sample in train + test:
        assert sample.answer in sample.messages[-1]["content"].lower()


def test_answers_are_right() -> None:
    for split in SPLITS:
        for sample in islice(samples(Sense("add", add, {}), split, seed=3), 300):
            a, b = sample.messages[1]["content"].lower().split(" is ")[0].split(" plus ")
            assert NUMBERS.index(a) + NUMBERS.index(b) == NUMBERS.index(sample.answer)
            question = sample.messages[0]["content"][0]["text"].lower().replace("?", "").replace(".", "").split()
            asked = [int(word) if word.isdigit() else NUMBERS.index(word) for word in question if word in KNOWN]
            assert sum(asked) == NUMBERS.index(sample.answer), question
        for sample in islice(samples(Sense("count", count, {}), split, seed=3), 100):
            numbers = [NUMBERS.index(word) for word in sample.answer.split(", ")]
            assert numbers == list(range(numbers[0], numbers[-1] + 1))
        for sample in islice(samples(Sense("spell", spell, {}), split, seed=3), 100):
            word = sample.answer.replace(", ", "")
            assert word in nouns(split) or split == "train" and word not in NOUNS
        for sample in islice(samples(Sense("remember", remember, {}), split, seed=3), 100):
            assert sample.answer in sample.messages[0]["content"][0]["text"].lower()
        repeated = list(islice(samples(Sense("repeat", repeat, {}), split, seed=3), 100))
        assert {len(sample.answer.split()) for sample in repeated} == {*range(REPEATED[split][0], 6)}
        assert all(sample.answer in sample.messages[0]["content"][0]["text"].lower() for sample in repeated)


def test_words_that_are_made_up() -> None:
    words = [made_up(np.random.default_rng(seed)) for seed in range(1000)]
    assert len(set(words)) > 800 and not set(words) & set(NOUNS)
    assert all(2 <= len(word) <= 10 and word.isalpha() and word.islower() for word in words)
    assert set("".join(words)) == set(ascii_lowercase)


def test_the_last_wordings_are_the_tests() -> None:
    choices, draw = ("a", "b", "c", "d", "e"), np.random.default_rng(0)
    assert {wording(draw, choices, "train") for _ in range(60)} == {"a", "b"} == set(trained_on(choices))
    assert {wording(draw, choices, "test") for _ in range(60)} == {"c", "d", "e"}


def test_words_are_split() -> None:
    assert not set(nouns("train")) & set(nouns("test")) and set(nouns("train")) | set(nouns("test")) == set(NOUNS)
    assert len(set(NOUNS)) == len(NOUNS)
