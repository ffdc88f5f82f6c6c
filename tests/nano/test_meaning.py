"""The shipped model answers by what it hears and sees: without one of its parts, the sense that needs it fails.

Rows are those of `tests/data/nano`, on which no stage was trained.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax as oj
from omni_jax.decode.speech.speakers import Speakers
from omni_jax.omni import Omni
from omni_jax.rows.media import located
from omni_jax.settings import Voice
from omni_jax.weights.locate import NANO
from scripts.nano.ablation import ABLATIONS, NEEDED, write_ablated
from scripts.nano.judging import is_right, words
from scripts.nano.words import DIGITS

# What the whole model must have right of each sense, and how much of that a part takes with it.
SHARES, LOST = {"scene": 0.8, "written": 0.8, "when": 0.8, "digits": 0.8, "red": 0.8}, 0.25
GREEDY = Voice(speech_temperature=0.0)
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def omni() -> Omni:
    return oj.load("nano")


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> Callable[[str], Rows]:
    """The rows of a sense, with places of media that can be opened."""

    def of(sense: str) -> Rows:
        found = map(json.loads, (data_dir / "nano" / f"{sense}.jsonl").read_text().splitlines())
        return [{**row, "asked": located(row["messages"][:-1], data_dir / "nano")} for row in found]

    return of


def share(omni: Omni, rows: Rows) -> float:
    """The share of rows that a model answers right."""
    asked: list[list[dict[str, Any]]] = [row["asked"] for row in rows]
    replies = omni.generate(asked, max_new_tokens=40)
    return float(np.mean([is_right(row, reply.text) for row, reply in zip(rows, replies, strict=True)]))


@pytest.fixture(scope="module")
def whole(omni: Omni, rows: Callable[[str], Rows]) -> dict[str, float]:
    return {sense: share(omni, rows(sense)) for sense in SHARES}


def test_the_whole_model_answers(whole: dict[str, float]) -> None:
    assert {sense: found for sense, found in whole.items() if found < SHARES[sense]} == {}


@pytest.mark.parametrize("part", NEEDED)
def test_a_sense_fails_without_its_part(
    part: str, whole: dict[str, float], rows: Callable[[str], Rows], tmp_path: Path
) -> None:
    sense = ABLATIONS[part].sense
    without = oj.load(write_ablated(NANO, part, tmp_path / part), parts=("thinker",))
    assert share(without, rows(sense)) < whole[sense] - LOST


def test_it_says_what_it_writes_and_nothing_without_its_text(omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by its own ear: that others understand it is measured in docs/nano.md."""
    said = [" ".join(DIGITS[i] for i in digits) for digits in ((4, 2), (7, 0, 1), (9, 3), (5, 8, 6))]
    assert heard_share(omni, said) >= 0.8
    text_ids = Speakers._text_ids
    monkeypatch.setattr(Speakers, "_text_ids", lambda self: np.full_like(text_ids(self), self.config.tts_pad_token_id))
    assert heard_share(omni, said) <= 0.2


def heard_share(omni: Omni, texts: list[str]) -> float:
    """The share of digits that the model hears in what it reads aloud, each in its place.

    The first does not count: its token is in the prompt, and only the others come with the frames.
    """
    right = 0
    for text in texts:
        sound = omni.speak(f"{text.capitalize().replace(' ', ', ')}.", voice=GREEDY).audio
        assert sound is not None
        part = {"type": "audio", "audio": sound, "sampling_rate": 24_000}
        question = {"type": "text", "text": "Which digits are spoken?"}
        reply = omni.generate([{"role": "user", "content": [part, question]}], max_new_tokens=24)
        heard = [word for word in words(reply.text) if word in DIGITS]
        right += sum(a == b for a, b in zip(text.split()[1:], heard[1:], strict=False))
    return right / sum(len(text.split()) - 1 for text in texts)
